"""The interpreter computes bf16 as numbers: without this, no bf16 kernel test means anything."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    square = offs[:, None] * SIZE + offs[None, :]
    product = tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square))
    tl.store(c_ptr + square, product)


@triton.jit
def _round_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE)), axis=0))


def test_bf16_dot_multiplies_numbers_not_bit_patterns(device):
    a, b = torch.randn(2, 16, 16, device=device, dtype=torch.bfloat16)
    c = torch.full((16, 16), float("nan"), device=device)
    _dot_kernel[(1,)](a, b, c, SIZE=16)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_fp32_to_bf16_rounds_to_nearest_even(device):
    x = torch.cat([torch.randn(253), torch.tensor([1.00390625, 1.01171875, -1.01171875])])
    x = x.to(device)
    y = torch.full((256,), float("nan"), device=device, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, y, SIZE=256)
    assert torch.equal(y, x.to(torch.bfloat16))


def test_bf16_sum_adds_numbers_not_bit_patterns(device):
    x = torch.tensor([0.5, -2.0, 8.0, 1.0], device=device, dtype=torch.bfloat16)
    y = torch.full((1,), float("nan"), device=device, dtype=torch.bfloat16)
    _sum_kernel[(1,)](x, y, SIZE=4)
    assert y.item() == 7.5
