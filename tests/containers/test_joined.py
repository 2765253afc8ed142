"""Tensors seen as one where they are neighbours in memory, and what should be neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tritonhybrid.containers.joined import joined, neighbours
from tritonhybrid.containers.parts import find_parts


def test_neighbours_are_one_matrix_that_shares_their_memory():
    flat = torch.arange(100.0)
    q, k, v = flat[3:27].view(6, 4), flat[27:35].view(2, 4), flat[35:43].view(2, 4)
    view = joined(q, k, v)
    assert view.shape == (10, 4)
    assert torch.equal(view, torch.cat([q, k, v]))
    view[6] = -1
    assert torch.equal(k[0], torch.full((4,), -1.0))
    q[0, 0] = 50
    assert view[0, 0] == 50
    assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_biases_and_parameters_join_without_gradient():
    flat = torch.arange(10.0)
    parameters = [nn.Parameter(flat[:6]), nn.Parameter(flat[6:8]), nn.Parameter(flat[8:])]
    view = joined(*parameters)
    assert torch.equal(view, flat)
    assert not view.requires_grad
    with torch.no_grad():
        parameters[1].fill_(7)
    assert view[6:8].tolist() == [7, 7]
    assert torch.equal(joined(parameters[0]), flat[:6])


@pytest.mark.parametrize(
    "case", ["gap", "order", "storage", "width", "dtype", "strides", "empty", "scalars", "overlap"]
)
def test_what_is_no_neighbour_is_not_joined(case):
    flat = torch.arange(100.0)
    a = flat[:8].view(2, 4)
    tensors = {
        "gap": (a, flat[9:17].view(2, 4)),
        "order": (flat[8:16].view(2, 4), a),
        "storage": (a, flat[8:16].clone().view(2, 4)),
        "width": (a, flat[8:16].view(4, 2)),
        "dtype": (a, flat.view(torch.int32)[8:16].view(2, 4)),
        "strides": (a, flat[8:16].view(4, 2).t()),
        "empty": (torch.empty(0), torch.empty(0)),
        "scalars": (flat[0], flat[1]),
        "overlap": (a, flat[4:12].view(2, 4)),
    }[case]
    assert joined(*tensors) is None


def test_two_storages_that_happen_to_touch_are_not_joined():
    memory = bytearray(64)
    front = torch.frombuffer(memory, dtype=torch.float32, count=8)
    back = torch.frombuffer(memory, dtype=torch.float32, count=8, offset=32)
    assert front.data_ptr() + 32 == back.data_ptr()
    assert joined(front, back) is None


def test_what_should_be_neighbours_is_named_in_the_order_of_the_description():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names[id(p)] for p in group] for group in neighbours(find_parts(model).layers)]
    assert found == [
        [f"model.layers.{layer}.{owner}.{name}_proj.{kind}" for name in members]
        for layer in (0, 1)
        for owner, members, kind in (
            ("self_attn", "qkv", "weight"),
            ("self_attn", "qkv", "bias"),
            ("mlp", ("gate", "up"), "weight"),
        )
    ]


def test_a_layer_that_is_not_described_names_none():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    assert neighbours(find_parts(model).layers) == []
