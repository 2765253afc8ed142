"""The torch operators: schema, shape rule, tracing, and the values of the torch paths."""

from __future__ import annotations

from inspect import signature
from itertools import combinations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from tritonhybrid_kernels.library import NAMESPACE
from tritonhybrid_kernels.ops import OP_NAMES, select_ops

# The arguments each op overwrites.
MUTATED = {
    "add_rms_norm": {"residual"},
    "rope_kv_write": {"q", "k", "k_cache", "v_cache"},
    "decode_advance": {
        *("input_ids", "positions", "next_positions", "slot_mapping", "context_lens", "steps"),
        *("ring_tokens", "ring_logprobs", "ring_raw_logprobs", "rope_rows"),
    },
}

# What an operator has no argument for: memory to write to, and tuning.
LEFT_OUT = {"out", "workspace", "config"}


def overload(name):
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def cache(device, dtype):
    """Keys and values of two sequences, of 5 and 3 tokens, in pages of 4."""
    k_cache, v_cache = torch.randn(2, 4, 4, 2, 16).to(device, dtype)
    tables = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([5, 3], dtype=torch.int32, device=device)
    return k_cache, v_cache, tables, lengths


def draws(device):
    index = torch.arange(2, device=device)
    return {"keys": index + 7, "uids": index, "positions": index + 3}


def arguments(name, device, dtype):
    """Positional and keyword arguments of a call."""

    def normal(*shape):
        return torch.randn(*shape).to(device, dtype)

    k_cache, v_cache, tables, lengths = cache(device, dtype)
    table = normal(9, 16)
    index = torch.tensor([6, 1], device=device)
    sampled = {"temperature": torch.tensor([0.0, 0.7], device=device), **draws(device)}
    greedy = torch.tensor([True, False], device=device)
    cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32, device=device)
    return {
        "add_rms_norm": ((normal(3, 24), normal(24), 1e-5), {"residual": normal(3, 24)}),
        "linear": ((normal(3, 24), normal(8, 24), normal(8), normal(3, 8)), {}),
        "qkv_linear": ((normal(3, 24), normal(8, 24), normal(4, 24), normal(4, 24)), {}),
        "gate_up_silu": ((normal(3, 24), normal(8, 24), normal(8, 24)), {"activation": "gelu"}),
        "rope_kv_write": (
            (
                *(normal(2, 4, 16), normal(2, 2, 16), normal(2, 2, 16), table, table.clone()),
                *(index, index + 4, k_cache, v_cache),
            ),
            {"q_norm_weight": normal(16), "norm_eps": 1e-5},
        ),
        "attention_varlen": (
            (normal(4, 4, 16), k_cache, v_cache, tables, cu_seqlens, lengths),
            {"scale": 0.25, "max_seqlen_q": 3, "window": 4},
        ),
        "paged_attention_decode": (
            (normal(2, 4, 16), k_cache, v_cache, tables, lengths),
            {"scale": 0.25, "num_splits": 2},
        ),
        "sample_logits": (
            (torch.randn(2, 40, device=device),),
            {**draws(device), "greedy": greedy},
        ),
        "lm_head_sample": ((normal(2, 24), normal(40, 24)), sampled),
        "decode_advance": (
            (index + 20, *torch.randn(2, 2, device=device).unbind()),
            {
                "input_ids": index.clone(),
                "positions": lengths.long() - 1,
                "next_positions": lengths.long(),
                "slot_mapping": torch.tensor([0, 14], device=device),
                "context_lens": lengths,
                "steps": torch.zeros(2, dtype=torch.int64, device=device),
                "last_positions": lengths.long() + 1,
                "block_table": tables,
                "block_size": 4,
                "ring_tokens": torch.zeros(3, 2, dtype=torch.int64, device=device),
                "ring_logprobs": torch.zeros(3, 2, device=device),
                "ring_raw_logprobs": torch.zeros(3, 2, device=device),
            },
        ),
    }[name]


def test_every_op_is_registered_and_nothing_else():
    registered = {
        name.removeprefix(f"{NAMESPACE}::").removesuffix(".default")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{NAMESPACE}::")
    }
    assert registered == set(OP_NAMES)


@pytest.mark.parametrize("name", OP_NAMES)
def test_a_schema_has_the_launchers_arguments_and_says_which_are_overwritten(name):
    parameters = signature(getattr(select_ops("triton"), name)).parameters
    schema = overload(name)._schema
    assert [argument.name for argument in schema.arguments] == [
        key for key in parameters if key not in LEFT_OUT
    ]
    for argument in schema.arguments:
        parameter = parameters[argument.name]
        assert argument.kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY)
        assert argument.has_default_value() == (parameter.default is not parameter.empty)
        if argument.has_default_value():
            assert argument.default_value == parameter.default
    mutated = {argument.name for argument in schema.arguments if argument.is_write}
    assert mutated == MUTATED.get(name, set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OP_NAMES)
def test_shapes_and_dtypes_under_a_tracer_are_the_real_ones(device, name, dtype):
    args, kwargs = arguments(name, device, dtype)
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = tree_map(
            lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf,
            (args, kwargs),
        )
        fake = overload(name)(*fake_args, **fake_kwargs)
    real = overload(name)(*args, **kwargs)
    assert [describe(leaf) for leaf in tree_leaves(fake)] == [
        describe(leaf) for leaf in tree_leaves(real)
    ]


def describe(leaf):
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OP_NAMES)
def test_an_operator_computes_and_overwrites_what_its_torch_path_does(device, name, dtype):
    args, kwargs = arguments(name, device, dtype)
    expected_args, expected_kwargs = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
    )
    results = overload(name)(*args, **kwargs)
    expected = getattr(select_ops("torch"), name)(*expected_args, **expected_kwargs)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(results, expected, **tolerance)
    if name == "rope_kv_write":
        # The keys are left as they are or overwritten.
        args, expected_args = (args[0], *args[2:]), (expected_args[0], *expected_args[2:])
    torch.testing.assert_close(
        [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)],
        [leaf for leaf in tree_leaves((expected_args, expected_kwargs)) if torch.is_tensor(leaf)],
        **tolerance,
    )


@pytest.mark.parametrize("name", OP_NAMES)
def test_results_share_no_memory_with_each_other_or_with_arguments(device, name):
    args, kwargs = arguments(name, device, torch.float32)
    results = tree_leaves(overload(name)(*args, **kwargs))
    tensors = [leaf for leaf in results + tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
    for one, other in combinations(tensors, 2):
        if any(one is result or other is result for result in results):
            assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", OP_NAMES)
def test_torch_finds_no_fault_with_an_operator(device, name):
    args, kwargs = arguments(name, device, torch.float32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    outcome = torch.library.opcheck(overload(name), args, kwargs, test_utils=checks)
    assert outcome == dict.fromkeys(checks, "SUCCESS")
