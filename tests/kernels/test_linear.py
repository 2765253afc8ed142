"""linear against fp64: every tile, ragged sizes, strides, Hugging Face's two cast points."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.linear import linear, linear_ref
from tritonhybrid_kernels.matmul_tile import matmul_config, matmul_tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(device, dtype, num_rows, num_columns, depth):
    x = torch.randn(num_rows, depth, device=device, dtype=dtype)
    weight = torch.randn(num_columns, depth, device=device, dtype=dtype) / depth**0.5
    bias = torch.randn(num_columns, device=device, dtype=dtype)
    residual = torch.randn(num_rows, num_columns, device=device, dtype=dtype)
    return x, weight, bias, residual


def exact(x, weight, bias=None, residual=None):
    y = x.double() @ weight.double().t()
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 183])
def test_matches_fp64_at_ragged_row_counts(device, dtype, num_rows, assert_accurate, poisoned):
    x, weight, bias, residual = operands(device, dtype, num_rows, 72, 200)
    out = poisoned(num_rows, 72, dtype=dtype, device=device)
    y = linear(x, weight, bias, residual, out=out)
    assert y is out
    torch_result = functional.linear(x, weight, bias) + residual
    assert_accurate(y, exact(x, weight, bias, residual), torch_result)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_bias_and_residual_are_each_optional(device, has_bias, has_residual, assert_accurate):
    x, weight, bias, residual = operands(device, torch.float32, 5, 48, 33)
    bias, residual = bias if has_bias else None, residual if has_residual else None
    expected = exact(x, weight, bias, residual)
    assert_accurate(linear(x, weight, bias, residual), expected)
    assert_accurate(linear_ref(x, weight, bias, residual), expected)


@pytest.mark.parametrize("num_columns", [1, 15, 16, 130])
@pytest.mark.parametrize("depth", [1, 16, 127, 130])
def test_sizes_off_the_block_multiples(device, num_columns, depth, assert_accurate, poisoned):
    x, weight, _, _ = operands(device, torch.float32, 3, num_columns, depth)
    out = poisoned(3, num_columns, dtype=torch.float32, device=device)
    assert_accurate(linear(x, weight, out=out), exact(x, weight))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (dtype, config)
        for dtype in (torch.float32, torch.bfloat16)
        for config in matmul_tiles(dtype, 90)
    ],
)
def test_every_tile_of_the_heuristic_computes_the_same(device, dtype, config, assert_accurate):
    # Three tiles of rows and of columns, both ragged, and a partial group in the grouped order.
    config = config._replace(group_m=2)
    num_rows, num_columns = 2 * config.block_m + 5, 2 * config.block_n + 3
    x, weight, bias, residual = operands(device, dtype, num_rows, num_columns, config.block_k + 8)
    y = linear(x, weight, bias, residual, config=config)
    torch_result = functional.linear(x, weight, bias) + residual
    assert_accurate(y, exact(x, weight, bias, residual), torch_result)


def test_strided_rows_and_offset_views_are_read_in_place(device, assert_accurate):
    wide_x = torch.randn(7, 96, device=device)
    wide_weight = torch.randn(40, 80, device=device)
    wide_residual = torch.randn(7, 99, device=device)
    wide_out = torch.full((7, 64), float("nan"), device=device)
    x, weight = wide_x[:, 3:67], wide_weight[4:37, 9:73]
    residual, out = wide_residual[:, 1:34], wide_out[:, 2:35]
    linear(x, weight, residual=residual, out=out)
    assert_accurate(out, exact(x, weight, residual=residual))
    assert wide_out[:, :2].isnan().all() and wide_out[:, 35:].isnan().all()


@pytest.mark.parametrize("op", [linear, linear_ref])
def test_the_residual_may_be_updated_in_place(device, op, assert_accurate):
    x, weight, _, residual = operands(device, torch.float32, 6, 40, 24)
    expected = exact(x, weight, residual=residual)
    assert op(x, weight, residual=residual, out=residual) is residual
    assert_accurate(residual, expected)


@pytest.mark.parametrize("op", [linear, linear_ref])
def test_the_product_is_rounded_before_the_residual_is_added(device, op):
    # 1 + 2^-9 rounds to 1 in bf16 (half way, to even); kept unrounded it would survive the -1.
    x = torch.tensor([[1.0, 2.0**-9]], device=device, dtype=torch.bfloat16)
    weight = torch.ones(1, 2, device=device, dtype=torch.bfloat16)
    residual = torch.tensor([[-1.0]], device=device, dtype=torch.bfloat16)
    assert op(x, weight, residual=residual).item() == 0.0


@pytest.mark.parametrize("op", [linear, linear_ref])
def test_the_bias_is_added_before_rounding(device, op):
    x = torch.tensor([[1.0, 2.0**-9]], device=device, dtype=torch.bfloat16)
    weight = torch.ones(1, 2, device=device, dtype=torch.bfloat16)
    bias = torch.tensor([-1.0], device=device, dtype=torch.bfloat16)
    assert op(x, weight, bias).item() == 2.0**-9


@pytest.mark.parametrize("op", [linear, linear_ref])
def test_no_rows_give_an_empty_result(device, op):
    weight = torch.randn(24, 8, device=device)
    y = op(torch.empty(0, 8, device=device), weight, torch.ones(24, device=device))
    assert y.shape == (0, 24)


@pytest.mark.parametrize("op", [linear, linear_ref])
@pytest.mark.parametrize("has_bias", [False, True])
def test_out_is_written_without_a_residual_too(device, op, has_bias, assert_accurate, poisoned):
    x, weight, bias, _ = operands(device, torch.float32, 4, 24, 16)
    bias = bias if has_bias else None
    out = poisoned(4, 24, dtype=torch.float32, device=device)
    assert op(x, weight, bias, out=out) is out
    assert_accurate(out, exact(x, weight, bias))


def test_a_row_has_the_same_bits_alone_in_a_batch_and_shuffled(device):
    x, weight, bias, _ = operands(device, torch.float32, 16, 48, 96)
    order = torch.randperm(16, device=device)
    batch = linear(x, weight, bias)
    assert torch.equal(linear(x[order], weight, bias), batch[order])
    assert torch.equal(linear(x[3:4], weight, bias), batch[3:4])


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "depth"),
    [(1, 4096, 4096), (16, 6144, 4096), (128, 14336, 4096), (1, 1024, 3072)],
)
def test_decode_tiles_give_most_multiprocessors_work(num_rows, num_columns, depth):
    config = matmul_config(num_rows, num_columns, depth, torch.bfloat16, 90)
    tiles = -(-num_columns // config.block_n) * -(-num_rows // config.block_m)
    narrowest = min(tile.block_n for tile in matmul_tiles(torch.bfloat16, 90))
    assert tiles >= 132 * 0.9 or config.block_n == narrowest


@pytest.mark.parametrize("op", [linear])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, "x must have 2 dimensions"),
        ({"weight": torch.zeros(4, 9)}, r"weight has the wrong shape: expected \[4, 8\]"),
        ({"bias": torch.zeros(5)}, "bias has the wrong shape"),
        ({"residual": torch.zeros(3, 4)}, "residual has the wrong shape"),
        ({"out": torch.zeros(2, 5)}, "out has the wrong shape"),
        ({"weight": torch.zeros(4, 8, dtype=torch.bfloat16)}, "share one dtype"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "x must be a float tensor"),
        ({"weight": torch.zeros(8, 4).t()}, "contiguous in its last dimension"),
        ({"weight": torch.zeros(4, 8, device="meta")}, "on one device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(device, op, change, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8)} | change
    arguments = {k: v if v.is_meta else v.to(device) for k, v in arguments.items()}
    with pytest.raises(KernelArgumentError, match=message):
        op(**arguments)


@pytest.mark.gpu
def test_a_prefill_at_model_size_matches_fp32(device, assert_accurate):
    x, weight, bias, residual = operands(device, torch.bfloat16, 4096, 4096, 4096)
    torch_result = functional.linear(x, weight, bias) + residual
    y = linear(x, weight, bias, residual)
    assert_accurate(y, exact(x, weight, bias, residual), torch_result)
