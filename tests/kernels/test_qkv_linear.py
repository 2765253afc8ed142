"""qkv_linear against fp64: three weights, one launch, every boundary between them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.matmul_tile import matmul_tiles
from tritonhybrid_kernels.qkv_linear import qkv_linear, qkv_linear_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = (qkv_linear, qkv_linear_ref)


def operands(device, dtype, num_rows, depth, q_columns, kv_columns):
    x = torch.randn(num_rows, depth, device=device, dtype=dtype)
    weights = [
        torch.randn(columns, depth, device=device, dtype=dtype) / depth**0.5
        for columns in (q_columns, kv_columns, kv_columns)
    ]
    biases = [
        torch.randn(columns, device=device, dtype=dtype)
        for columns in (q_columns, kv_columns, kv_columns)
    ]
    return x, weights, biases


def check(results, x, weights, biases, assert_accurate):
    for result, weight, bias in zip(results, weights, biases, strict=True):
        exact = x.double() @ weight.double().t()
        exact = exact if bias is None else exact + bias.double()
        assert result.is_contiguous()
        assert_accurate(result, exact, functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 183])
def test_matches_fp64_at_ragged_row_counts(device, dtype, num_rows, assert_accurate):
    x, weights, biases = operands(device, dtype, num_rows, 80, 96, 24)
    check(qkv_linear(x, *weights, *biases), x, weights, biases, assert_accurate)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("q_columns", "kv_columns"), [(64, 64), (72, 8), (33, 1), (16, 48)])
def test_uneven_heads_and_optional_bias(
    device, op, has_bias, q_columns, kv_columns, assert_accurate
):
    x, weights, biases = operands(device, torch.float32, 3, 40, q_columns, kv_columns)
    biases = biases if has_bias else [None] * 3
    check(op(x, *weights, *biases), x, weights, biases, assert_accurate)


@pytest.mark.parametrize("config", matmul_tiles(torch.bfloat16, 90))
def test_every_tile_of_the_heuristic_computes_the_same(device, config, assert_accurate):
    config = config._replace(group_m=2)
    num_rows, kv_columns = config.block_m + 3, config.block_n + 5
    x, weights, biases = operands(
        device, torch.bfloat16, num_rows, config.block_k + 24, 2 * config.block_n + 1, kv_columns
    )
    results = qkv_linear(x, *weights, *biases, config=config)
    check(results, x, weights, biases, assert_accurate)


def test_weights_may_be_strided_views_of_one_arena(device, assert_accurate):
    arena = torch.randn(64, 72, device=device)
    x = torch.randn(4, 90, device=device)[:, 7:39]
    weights = [arena[:32, :32], arena[32:48, 40:72], arena[48:, 3:35]]
    check(qkv_linear(x, *weights), x, weights, [None] * 3, assert_accurate)


def test_it_is_one_launch(device, monkeypatch):
    from tritonhybrid_kernels import qkv_linear as module

    launches = []
    kernel = module._qkv_linear_kernel

    class Recorder:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_qkv_linear_kernel", Recorder())
    x, weights, biases = operands(device, torch.float32, 2, 16, 32, 16)
    qkv_linear(x, *weights, *biases)
    assert len(launches) == 1


@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_empty_results(device, op):
    _, weights, biases = operands(device, torch.float32, 1, 8, 24, 16)
    results = op(torch.empty(0, 8, device=device), *weights, *biases)
    assert [tuple(result.shape) for result in results] == [(0, 24), (0, 16), (0, 16)]


@pytest.mark.parametrize("op", [qkv_linear])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, "x must have 2 dimensions"),
        ({"q_weight": torch.zeros(6, 9)}, "q_weight has the wrong shape"),
        ({"v_weight": torch.zeros(5, 8)}, r"v_weight has the wrong shape: expected \[4, 8\]"),
        ({"q_bias": torch.zeros(6)}, "biases come together: expected all three or none, got 1"),
        (
            {"q_bias": torch.zeros(6), "k_bias": torch.zeros(4), "v_bias": torch.zeros(6)},
            "v_bias has the wrong shape",
        ),
        ({"k_weight": torch.zeros(4, 8, dtype=torch.float16)}, "share one dtype"),
        ({"k_weight": torch.zeros(8, 4).t()}, "contiguous in its last dimension"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(device, op, change, message):
    arguments = {
        "x": torch.zeros(2, 8),
        "q_weight": torch.zeros(6, 8),
        "k_weight": torch.zeros(4, 8),
        "v_weight": torch.zeros(4, 8),
    } | change
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    with pytest.raises(KernelArgumentError, match=message):
        op(**arguments)
