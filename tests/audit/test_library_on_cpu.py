"""Without the interpreter the operators run the torch paths on the CPU, and tracers take them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tritonhybrid_kernels import library
from tritonhybrid_kernels.add_rms_norm import add_rms_norm_ref
from tritonhybrid_kernels.gate_up_silu import gate_up_silu_ref
from tritonhybrid_kernels.linear import linear_ref

OPS = getattr(torch.ops, library.NAMESPACE)


class FeedForward(torch.nn.Module):
    """A layer's second half on the true residual stream, which it overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(16))
        self.gate, self.up = (torch.nn.Parameter(torch.randn(24, 16)) for _ in range(2))
        self.down = torch.nn.Parameter(torch.randn(16, 24))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = OPS.add_rms_norm(x, self.norm, 1e-5, residual=residual)
        return OPS.linear(OPS.gate_up_silu(y, self.gate, self.up), self.down, residual=residual)


def by_hand(module, x, residual):
    y = add_rms_norm_ref(x, module.norm, 1e-5, residual=residual)
    return linear_ref(gate_up_silu_ref(y, module.gate, module.up), module.down, residual=residual)


def compiled(module, x, residual):
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def exported(module, x, residual):
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows})
    return torch.export.export(module, (x, residual), dynamic_shapes=shapes).module()


@pytest.mark.parametrize("trace", [lambda module, x, residual: module, compiled, exported])
@pytest.mark.parametrize("rows", [3, 5])
@torch.no_grad()
def test_a_traced_layer_has_the_bits_of_the_torch_paths_and_writes_its_residual(trace, rows):
    torch.manual_seed(0)
    module = FeedForward()
    traced = trace(module, *torch.randn(2, 4, 16))
    x, residual = torch.randn(2, rows, 16)
    expected_residual = residual.clone()
    expected = by_hand(module, x.clone(), expected_residual)
    before = residual.clone()
    assert torch.equal(traced(x, residual), expected)
    assert torch.equal(residual, expected_residual)
    assert torch.equal(residual, before + x)


def test_an_exported_layer_names_the_operators():
    graph = torch.export.export(FeedForward(), tuple(torch.randn(2, 4, 16))).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == [
        "tritonhybrid.add_rms_norm.default",
        "tritonhybrid.gate_up_silu.default",
        "tritonhybrid.linear.default",
    ]
