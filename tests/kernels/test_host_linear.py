"""The CPU's matrix product is a linear layer whichever way it is computed."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels.host_linear import host_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [33, 8200])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 12, 13, 16, 17, 32, 33, 48, 49])
def test_it_gives_the_fp64_product_row_major(
    num_rows, has_bias, num_columns, dtype, assert_accurate
):
    # The left half of a wider tensor: rows with a stride of their own.
    x = torch.randn(num_rows, 140).to(dtype)[:, :70]
    weight = torch.randn(num_columns, 70).to(dtype)
    bias = torch.randn(num_columns).to(dtype) if has_bias else None
    y = host_linear(x, weight, bias)
    exact = x.double() @ weight.double().t()
    if bias is not None:
        exact = exact + bias.double()
    assert y.is_contiguous() and y.dtype == dtype
    assert_accurate(y, exact)


@pytest.mark.parametrize("num_rows", [4, 16, 48])
def test_it_keeps_the_fp32_of_its_operands(num_rows):
    # 1 + 2^-20 would be lost if the product fell back to bf16 or tf32.
    x = torch.full((num_rows, 1), 1 + 2.0**-20)
    weight = torch.ones(8200, 1)
    assert torch.equal(host_linear(x, weight, None), x.expand(num_rows, 8200))
