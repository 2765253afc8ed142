"""Heads of one token, loaded in parts that each thread reads 16 bytes of, normed and rotated.

A head is its two rotary halves and the rest that no rotation touches. A thread holds the same
places of both halves, so that the rotation needs no exchange, and the rows that all heads share
(norm weight, cosines, sines) are read once a head, in the heads' own layout.

Source: Su et al., "RoFormer" (arXiv:2104.09864), in the half-split layout of HF's ``rotate_half``.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.launch import check_last_stride, check_rank, check_shape, require


@triton.jit
def _load_row(row_ptr, offs, mask):
    """Load a row for every head of a program, in the heads' layout: no thread needs another's."""
    row_ptrs = tl.broadcast_to(row_ptr + offs[None, :], mask.shape)
    return tl.load(row_ptrs, mask=mask, other=0.0)


@triton.jit
def rotate_heads(
    x_ptr,  # a token's heads [heads, E]
    y_ptr,  # a token's heads [heads, E], may be x_ptr
    norm_ptr,  # [E]
    cos_ptr,  # a position's [R]
    sin_ptr,  # a position's [R]
    offs_h,
    num_heads,
    norm_eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Load heads, norm and rotate them in the dtype of x, and store them."""
    half: tl.constexpr = ROTARY_DIM // 2
    offs_half = tl.arange(0, BLOCK_HALF)
    offs_rest = tl.arange(0, BLOCK_REST)
    mask_h = offs_h[:, None] < num_heads
    mask_half = mask_h & (offs_half[None, :] < half)
    mask_rest = mask_h & (offs_rest[None, :] < HEAD_DIM - ROTARY_DIM)
    head_ptrs = x_ptr + offs_h[:, None] * HEAD_DIM
    first = tl.load(head_ptrs + offs_half[None, :], mask=mask_half, other=0.0)
    second = tl.load(head_ptrs + half + offs_half[None, :], mask=mask_half, other=0.0)
    rest = tl.load(head_ptrs + ROTARY_DIM + offs_rest[None, :], mask=mask_rest, other=0.0)
    dtype = first.dtype
    if HAS_NORM:
        squares = tl.sum(first.to(tl.float32) * first.to(tl.float32), axis=1)
        squares += tl.sum(second.to(tl.float32) * second.to(tl.float32), axis=1)
        squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + norm_eps)[:, None]
        w_first = _load_row(norm_ptr, offs_half, mask_half)
        w_second = _load_row(norm_ptr + half, offs_half, mask_half)
        w_rest = _load_row(norm_ptr + ROTARY_DIM, offs_rest, mask_rest)
        first = _weigh((first.to(tl.float32) * scale).to(dtype), w_first)
        second = _weigh((second.to(tl.float32) * scale).to(dtype), w_second)
        rest = _weigh((rest.to(tl.float32) * scale).to(dtype), w_rest)
    if HAS_ROPE:
        cos_first = _load_row(cos_ptr, offs_half, mask_half)
        cos_second = _load_row(cos_ptr + half, offs_half, mask_half)
        sin_first = _load_row(sin_ptr, offs_half, mask_half)
        sin_second = _load_row(sin_ptr + half, offs_half, mask_half)
        rotated_first = _weigh(first, cos_first).to(tl.float32) - _weigh(second, sin_first).to(
            tl.float32
        )
        rotated_second = _weigh(second, cos_second).to(tl.float32) + _weigh(first, sin_second).to(
            tl.float32
        )
        first = rotated_first.to(dtype)
        second = rotated_second.to(dtype)
    y_ptrs = y_ptr + offs_h[:, None] * HEAD_DIM
    tl.store(y_ptrs + offs_half[None, :], first, mask=mask_half)
    tl.store(y_ptrs + half + offs_half[None, :], second, mask=mask_half)
    tl.store(y_ptrs + ROTARY_DIM + offs_rest[None, :], rest, mask=mask_rest)


@triton.jit
def _weigh(x, weight):
    """Multiply in the weight's dtype: exact in fp32, then rounded, as a bf16 product is."""
    return (x.to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)


def head_vector(head_dim: int, rotary_dim: int, element_bytes: int, stride_cp: int) -> int:
    """Return how many numbers a thread reads at once: 16 bytes, or what divides a head's parts."""
    return gcd(rotary_dim // 2, head_dim - rotary_dim, 16 // element_bytes, stride_cp)


def head_blocks(
    num_tokens: int, head_dim: int, rotary_dim: int, vector: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the block sizes and the compile options of a launch."""
    block_half = triton.next_power_of_2(rotary_dim // 2)
    block_rest = triton.next_power_of_2(max(1, head_dim - rotary_dim))
    block_e = triton.next_power_of_2(head_dim)
    narrowest = min(block_half, block_rest) if rotary_dim < head_dim else block_half
    # A program takes so many heads that its narrowest part gives every thread of a warp a whole
    # read. Few tokens: no more, to spread over the device. Many: 1024 elements a program.
    warp_elements = 32 * vector
    block_h = max(1, warp_elements // narrowest)
    if num_tokens >= 128:
        block_h = max(block_h, 1024 // block_e)
    blocks = {
        "BLOCK_H": block_h,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
        "BLOCK_E": block_e,
    }
    return blocks, {"num_warps": max(1, min(4, block_h * narrowest // warp_elements))}


def check_rotation(
    op: str,
    q: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
) -> None:
    """Check the tables [P, R] and the norm weights [E] of heads [T, H, E].

    Raises:
        KernelArgumentError: a shape, dtype, device or stride is not as rope_kv_write takes it.
    """
    require(
        (cos is None) == (sin is None),
        f"{op}: cos and sin come together",
        "both or neither",
        "one of them",
        "Pass both tables, or None for both.",
    )
    if cos is not None and sin is not None:
        check_rank(op, "cos", cos, 2, "[P, R]")
        check_shape(op, "sin", sin, tuple(cos.shape))
        check_last_stride(op, "cos", cos)
        require(
            sin.stride() == cos.stride() and sin.dtype == cos.dtype,
            f"{op}: sin must be laid out as cos",
            f"{cos.dtype} with strides {cos.stride()}",
            f"{sin.dtype} with strides {sin.stride()}",
            "Make both contiguous and of one dtype.",
        )
        require(
            cos.dtype in (q.dtype, torch.float32) and cos.device == q.device,
            f"{op}: the tables must suit q",
            f"{q.dtype} or float32 on {q.device}",
            f"{cos.dtype} on {cos.device}",
            "Cast or move the tables.",
        )
    head_dim = q.shape[2]
    rotary_dim = head_dim if cos is None else cos.shape[1]
    require(
        0 < rotary_dim <= head_dim and rotary_dim % 2 == 0,
        f"{op}: the rotated part of a head must be even and fit the head",
        f"an even R <= {head_dim}",
        rotary_dim,
        "Slice the tables to the model's rotary dimension.",
    )
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None:
            check_shape(op, name, weight, (head_dim,))
