"""gate_up_silu against fp64: three activations, every tile, Hugging Face's cast points."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.gate_up_silu import ACTIVATIONS, gate_up_silu, gate_up_silu_ref
from tritonhybrid_kernels.matmul_tile import matmul_tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = (gate_up_silu, gate_up_silu_ref)
TORCH_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def operands(device, dtype, num_rows, depth, num_columns):
    x = torch.randn(num_rows, depth, device=device, dtype=dtype)
    gate, up = torch.randn(2, num_columns, depth, device=device, dtype=dtype) / depth**0.5
    gate_bias, up_bias = torch.randn(2, num_columns, device=device, dtype=dtype)
    return x, gate, up, gate_bias, up_bias


def plain(x, gate, up, gate_bias=None, up_bias=None, activation="silu"):
    """LlamaMLP's ``act_fn(gate_proj(x)) * up_proj(x)``; in fp64 the exact result."""
    gated = TORCH_ACTIVATIONS[activation](functional.linear(x, gate, gate_bias))
    return gated * functional.linear(x, up, up_bias)


def exact(*tensors, activation="silu"):
    doubles = (None if tensor is None else tensor.double() for tensor in tensors)
    return plain(*doubles, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 183])
def test_matches_fp64_at_ragged_row_counts(device, dtype, num_rows, assert_accurate):
    tensors = operands(device, dtype, num_rows, 80, 72)
    assert_accurate(gate_up_silu(*tensors), exact(*tensors), plain(*tensors))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(device, op, dtype, activation, assert_accurate):
    tensors = operands(device, dtype, 6, 32, 40)
    y = op(*tensors, activation=activation)
    expected = exact(*tensors, activation=activation)
    assert_accurate(y, expected, plain(*tensors, activation=activation))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("depth", "num_columns"), [(1, 1), (16, 15), (33, 17), (130, 48)])
def test_sizes_off_the_block_multiples_without_bias(
    device, op, depth, num_columns, assert_accurate
):
    tensors = operands(device, torch.float32, 3, depth, num_columns)[:3]
    assert_accurate(op(*tensors), exact(*tensors))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (dtype, config)
        for dtype in (torch.float32, torch.bfloat16)
        for config in sorted({*matmul_tiles(dtype, 80, 2), *matmul_tiles(dtype, 90, 2)})
    ],
)
def test_every_tile_of_the_heuristic_computes_the_same(device, dtype, config, assert_accurate):
    config = config._replace(group_m=2)
    tensors = operands(
        device, dtype, 2 * config.block_m + 1, config.block_k + 8, 2 * config.block_n + 3
    )
    y = gate_up_silu(*tensors, config=config)
    assert_accurate(y, exact(*tensors), plain(*tensors))


@pytest.mark.parametrize("op", OPS)
def test_gate_and_up_are_rounded_before_the_activation(device, op):
    # 1 + 2^-9 rounds to 1 in bf16 (half way, to even), for gate and for up alike.
    x = torch.tensor([[1.0, 2.0**-9]], device=device, dtype=torch.bfloat16)
    weight = torch.ones(1, 2, device=device, dtype=torch.bfloat16)
    one = torch.ones(1, device=device, dtype=torch.bfloat16)
    expected = functional.silu(one) * one
    assert op(x, weight, weight).item() == expected.item()


def test_large_gates_saturate_without_nan(device):
    x = torch.tensor([[1.0]], device=device)
    gate = torch.tensor([[-1e30], [-200.0], [0.0], [200.0], [1e30]], device=device)
    y = gate_up_silu(x, gate, torch.ones(5, 1, device=device))
    torch.testing.assert_close(y[0], torch.tensor([0.0, 0, 0, 200, 1e30], device=device))


def test_strided_rows_are_read_in_place(device, assert_accurate):
    x = torch.randn(5, 64, device=device)[:, 3:35]
    wide = torch.randn(48, 80, device=device)
    gate, up = wide[:24, 1:33], wide[24:, 40:72]
    assert_accurate(gate_up_silu(x, gate, up), exact(x, gate, up))


@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_an_empty_result(device, op):
    weight = torch.randn(24, 8, device=device)
    assert op(torch.empty(0, 8, device=device), weight, weight).shape == (0, 24)


@pytest.mark.parametrize("op", [gate_up_silu])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, "x must have 2 dimensions"),
        ({"gate_weight": torch.zeros(6, 9)}, "gate_weight has the wrong shape"),
        ({"up_weight": torch.zeros(5, 8)}, r"up_weight has the wrong shape: expected \[6, 8\]"),
        ({"gate_bias": torch.zeros(6)}, "biases come together"),
        ({"gate_bias": torch.zeros(6), "up_bias": torch.zeros(5)}, "up_bias has the wrong shape"),
        ({"up_weight": torch.zeros(6, 8, dtype=torch.float16)}, "share one dtype"),
        ({"activation": "relu"}, "unknown activation: expected silu, gelu, gelu_tanh, got relu"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(device, op, change, message):
    arguments = {
        "x": torch.zeros(2, 8, device=device),
        "gate_weight": torch.zeros(6, 8, device=device),
        "up_weight": torch.zeros(6, 8, device=device),
    }
    for name, value in change.items():
        arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(KernelArgumentError, match=message):
        op(**arguments)
