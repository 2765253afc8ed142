"""select_ops: the backend decides, named exceptions run torch, and the two agree on signatures."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from importlib import import_module

import pytest
import torch

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.ops import OP_NAMES, Ops, select_ops


def test_the_set_has_one_field_an_op():
    assert {field.name for field in fields(Ops)} == {*OP_NAMES, "backend", "torch_ops"}


@pytest.mark.parametrize("name", OP_NAMES)
def test_each_backend_gives_its_own_implementation(name):
    module = import_module(f"tritonhybrid_kernels.{name}")
    assert getattr(select_ops("triton"), name) is getattr(module, name)
    assert getattr(select_ops("torch"), name) is getattr(module, f"{name}_ref")


def test_named_ops_run_their_torch_path_under_triton():
    ops = select_ops("triton", frozenset({"linear", "attention_varlen"}))
    all_torch, all_triton = select_ops("torch"), select_ops("triton")
    for name in OP_NAMES:
        source = all_torch if name in ("linear", "attention_varlen") else all_triton
        assert getattr(ops, name) is getattr(source, name)
    assert ops.backend == "triton"
    assert ops.torch_ops == {"linear", "attention_varlen"}


@pytest.mark.parametrize("name", OP_NAMES)
def test_a_torch_path_takes_every_argument_of_its_launcher_but_its_tuning(name):
    """A caller may switch the backend without changing a call."""
    launcher = inspect.signature(getattr(select_ops("triton"), name)).parameters
    torch_path = inspect.signature(getattr(select_ops("torch"), name)).parameters
    shared = {key: (p.kind, p.default) for key, p in launcher.items() if key != "config"}
    assert {key: (p.kind, p.default) for key, p in torch_path.items()} == shared


def test_the_chosen_callables_compute(device):
    x, weight = torch.randn(3, 16, device=device), torch.randn(8, 16, device=device)
    results = [select_ops(backend).linear(x, weight) for backend in ("triton", "torch")]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_the_set_is_frozen():
    with pytest.raises(FrozenInstanceError):
        select_ops("torch").linear = None


def test_an_unknown_backend_is_refused():
    with pytest.raises(KernelArgumentError, match="expected triton or torch, got cuda"):
        select_ops("cuda")


def test_an_unknown_op_name_is_refused():
    with pytest.raises(
        KernelArgumentError, match=r"unknown op: expected names out of .* got lineal"
    ):
        select_ops("triton", frozenset({"lineal"}))
