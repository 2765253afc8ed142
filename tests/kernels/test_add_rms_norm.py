"""add_rms_norm against fp64: both cast rules, ragged widths, strides, the residual in place."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels.add_rms_norm import MAX_COLUMNS, add_rms_norm, add_rms_norm_ref
from tritonhybrid_kernels.errors import KernelArgumentError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = (add_rms_norm, add_rms_norm_ref)
EPS = 1e-5


def exact_norm(r, weight, weight_offset=0.0):
    r = r.double()
    return (
        r * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + EPS) * (weight_offset + weight.double())
    )


def llama_norm(r, weight):
    """LlamaRMSNorm.forward of transformers, in words."""
    wide = r.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(r.dtype)


def gemma_norm(r, weight):
    """Gemma2RMSNorm.forward of transformers, in words."""
    wide = r.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + weight.float())).type_as(r)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 48, 128, 576, 1000])
def test_matches_fp64_at_any_width(device, op, dtype, num_columns, assert_accurate, poisoned):
    x = torch.randn(5, num_columns, device=device, dtype=dtype)
    residual = torch.randn(5, num_columns, device=device, dtype=dtype)
    weight = torch.randn(num_columns, device=device, dtype=dtype)
    expected_sum = residual + x
    out = poisoned(5, num_columns, dtype=dtype, device=device)
    y = op(x, weight, EPS, residual=residual, out=out)
    assert y is out
    assert torch.equal(residual, expected_sum)
    assert_accurate(y, exact_norm(expected_sum, weight), llama_norm(expected_sum, weight))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 183])
def test_any_number_of_rows(device, op, num_rows, assert_accurate):
    x = torch.randn(num_rows, 48, device=device)
    residual = torch.randn(num_rows, 48, device=device)
    weight = torch.randn(48, device=device)
    expected = exact_norm(residual + x, weight)
    y = op(x, weight, EPS, residual=residual)
    assert y.shape == (num_rows, 48)
    assert_accurate(y, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_residual_the_input_is_normalised_and_kept(device, op, dtype, assert_accurate):
    x = torch.randn(3, 64, device=device, dtype=dtype)
    before, weight = x.clone(), torch.randn(64, device=device, dtype=dtype)
    y = op(x, weight, EPS)
    assert torch.equal(x, before)
    assert_accurate(y, exact_norm(x, weight), llama_norm(x, weight))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_llama_rounds_before_the_weight_and_gemma_after(device, op, dtype):
    x = torch.randn(64, 256, device=device, dtype=dtype)
    weight = torch.randn(256, device=device, dtype=dtype)
    llama, gemma = llama_norm(x, weight), gemma_norm(x, weight - 1)
    # The order of the fp32 sum may move a value across a rounding boundary, not the rule.
    assert (op(x, weight, EPS) != llama).float().mean() < 2e-3
    assert (op(x, weight - 1, EPS, weight_offset=1.0) != gemma).float().mean() < 2e-3
    assert (op(x, weight, EPS) != gemma).float().mean() > 2e-2


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_rule_matches_fp64(device, op, dtype, assert_accurate):
    x = torch.randn(4, 96, device=device, dtype=dtype)
    residual = torch.randn(4, 96, device=device, dtype=dtype)
    weight = 0.1 * torch.randn(96, device=device, dtype=dtype)
    total = residual + x
    y = op(x, weight, EPS, residual=residual, weight_offset=1.0)
    assert_accurate(y, exact_norm(total, weight, 1.0), gemma_norm(total, weight))


@pytest.mark.parametrize("op", OPS)
def test_strided_rows_are_read_and_written_in_place(device, op, assert_accurate, poisoned):
    wide_x, wide_residual = torch.randn(2, 6, 100, device=device)
    untouched = wide_residual.clone()
    wide_out = poisoned(6, 71, dtype=torch.float32, device=device)
    x, residual, out = wide_x[:, 5:69], wide_residual[:, 3:67], wide_out[:, 1:65]
    weight = torch.randn(64, device=device)
    expected = exact_norm(residual + x, weight)
    op(x, weight, EPS, residual=residual, out=out)
    assert_accurate(out, expected)
    assert wide_out[:, 0].isnan().all() and wide_out[:, 65:].isnan().all()
    assert torch.equal(wide_residual[:, :3], untouched[:, :3])
    assert torch.equal(wide_residual[:, 67:], untouched[:, 67:])


@pytest.mark.parametrize("op", OPS)
def test_rows_of_zeros_and_of_huge_values_stay_finite(device, op, assert_accurate):
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e15), torch.full((64,), 1e-18)])
    x, weight = x.to(device), torch.ones(64, device=device)
    assert_accurate(op(x, weight, EPS), exact_norm(x, weight))


@pytest.mark.parametrize("op", OPS)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(device, op):
    x, weight = torch.randn(9, 200, device=device), torch.randn(200, device=device)
    assert torch.equal(op(x[4:5], weight, EPS), op(x, weight, EPS)[4:5])


@pytest.mark.parametrize("op", [add_rms_norm])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, "x must have 2 dimensions"),
        ({"weight": torch.zeros(9)}, r"weight has the wrong shape: expected \[8\], got \[9\]"),
        ({"residual": torch.zeros(3, 8)}, "residual has the wrong shape"),
        ({"residual": torch.zeros(2, 8, dtype=torch.float16)}, "share one dtype"),
        ({"out": torch.zeros(1, 8)}, "out has the wrong shape"),
        ({"x": torch.zeros(8, 2).t()}, "contiguous in its last dimension"),
        (
            {"x": torch.zeros(1, MAX_COLUMNS + 1), "weight": torch.zeros(MAX_COLUMNS + 1)},
            "fit the registers",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(device, op, change, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(8)} | change
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    with pytest.raises(KernelArgumentError, match=message):
        op(eps=EPS, **arguments)
