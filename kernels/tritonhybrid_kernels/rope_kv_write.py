"""Normalise and rotate query and key heads and write keys and values into the paged cache.

    q = rotate(norm(q)); k_cache[slot] = rotate(norm(k)); v_cache[slot] = v

One launch does what takes a norm, a rotation and a cache write each for q, k and v elsewhere:
every element is read and written once. A program takes one token and just so many heads that each
thread has 16 bytes of a rotary half, so that a decode step of one token still fills some
multiprocessors.

Layout: heads [T, heads, E] with any row stride; caches [N, S, K, E] with any block stride;
``slot = block * S + offset``, -1 for a token that is not kept.

Source: Su et al., "RoFormer" (arXiv:2104.09864), in the half-split layout of HF's ``rotate_half``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.dependent_launch import await_predecessor
from tritonhybrid_kernels.launch import (
    LaunchCase,
    NarrowRead,
    check_launchable,
    check_operands,
    check_rank,
    check_shape,
    decode_options,
)
from tritonhybrid_kernels.paged_cache import check_heads, check_index, check_paged_cache
from tritonhybrid_kernels.rotated_heads import (
    check_rotation,
    head_blocks,
    head_vector,
    rotate_heads,
)

# Decode steps of up to so many rows are bound by calls, not by copies.
_FEW_TOKENS: Final = 32


@triton.jit
def _rope_kv_write_kernel(
    q_ptr,  # [T, H, E]
    k_ptr,  # [T, K, E]
    v_ptr,  # [T, K, E]
    cos_ptr,  # [P, R]
    sin_ptr,  # [P, R]
    positions_ptr,  # [T]
    slot_mapping_ptr,  # [T]
    k_cache_ptr,  # [N, S, K, E]
    v_cache_ptr,  # [N, S, K, E]
    q_norm_ptr,  # [E]
    k_norm_ptr,  # [E]
    stride_qt,
    stride_kt,
    stride_vt,
    stride_cp,
    stride_kn,
    stride_vn,
    norm_eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        await_predecessor()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    q_groups: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    if HAS_ROPE:
        row = tl.multiple_of(tl.load(positions_ptr + token) * stride_cp, VECTOR)
        cos_ptr += row
        sin_ptr += row
    if group < q_groups:
        q_ptr += token * stride_qt
        rotate_heads(
            q_ptr,
            q_ptr,
            q_norm_ptr,
            cos_ptr,
            sin_ptr,
            group * BLOCK_H + tl.arange(0, BLOCK_H),
            NUM_HEADS,
            norm_eps,
            HEAD_DIM,
            ROTARY_DIM,
            HAS_Q_NORM,
            HAS_ROPE,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        slot = tl.load(slot_mapping_ptr + token)
        if slot >= 0:
            offs_h = (group - q_groups) * BLOCK_H + tl.arange(0, BLOCK_H)
            block = slot // BLOCK_SIZE
            in_block = (slot % BLOCK_SIZE) * NUM_KV_HEADS * HEAD_DIM
            rotate_heads(
                k_ptr + token * stride_kt,
                k_cache_ptr + block * stride_kn + in_block,
                k_norm_ptr,
                cos_ptr,
                sin_ptr,
                offs_h,
                NUM_KV_HEADS,
                norm_eps,
                HEAD_DIM,
                ROTARY_DIM,
                HAS_K_NORM,
                HAS_ROPE,
                BLOCK_HALF,
                BLOCK_REST,
            )
            offs_e = tl.arange(0, BLOCK_E)
            offs = offs_h[:, None] * HEAD_DIM + offs_e[None, :]
            mask = (offs_h[:, None] < NUM_KV_HEADS) & (offs_e[None, :] < HEAD_DIM)
            value = tl.load(v_ptr + token * stride_vt + offs, mask=mask)
            tl.store(v_cache_ptr + block * stride_vn + in_block + offs, value, mask=mask)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """Norm and rotate q in place, and write normed, rotated keys and the values to their slots.

    The rotation has HF's rounding: with tables in the dtype of q both products and their sum are
    rounded to it; with fp32 tables only the result is.

    Args:
        q: [T, H, E] query heads, overwritten.
        k: [T, K, E] key heads; left as they are or overwritten, the caller may not rely on either.
        v: [T, K, E] value heads.
        cos: [P, R] cosines by position, ``cat(freqs, freqs)`` along R <= E, in the dtype of q or
            fp32; None for no rotation.
        sin: [P, R] sines, as `cos`.
        positions: [T] int64, each in [0, P); not checked.
        slot_mapping: [T] int64 slots, distinct, each in [0, N * S) or -1: no write; not checked.
        k_cache: [N, S, K, E], written in place.
        v_cache: [N, S, K, E], written in place.
        q_norm_weight: [E] weight of an RMS norm over each query head before the rotation.
        k_norm_weight: [E] likewise for keys.
        norm_eps: added to the mean of squares.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride is not as above.
    """
    _check(
        q, k, v, cos, sin, positions, slot_mapping, k_cache, v_cache, q_norm_weight, k_norm_weight
    )
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens == 0:
        return
    check_launchable("rope_kv_write", q.device)
    num_kv_heads, block_size = k.shape[1], k_cache.shape[1]
    has_rope = cos is not None and sin is not None
    rotary_dim = head_dim if cos is None else cos.shape[1]
    stride_cp = 0 if cos is None else cos.stride(0)
    vector = head_vector(head_dim, rotary_dim, q.element_size(), stride_cp)
    blocks, options = head_blocks(num_tokens, head_dim, rotary_dim, vector)
    groups = triton.cdiv(num_heads, blocks["BLOCK_H"]) + triton.cdiv(
        num_kv_heads, blocks["BLOCK_H"]
    )
    _rope_kv_write_kernel[(num_tokens, groups)](
        q,
        k,
        v,
        cos,
        sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        q_norm_weight,
        k_norm_weight,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        stride_cp,
        k_cache.stride(0),
        v_cache.stride(0),
        norm_eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_SIZE=block_size,
        HAS_Q_NORM=q_norm_weight is not None,
        HAS_K_NORM=k_norm_weight is not None,
        HAS_ROPE=has_rope,
        VECTOR=vector,
        **blocks,
        **options,
        **decode_options(q.device),
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
) -> None:
    op = "rope_kv_write"
    check_rank(op, "q", q, 3, "[T, H, E]")
    check_rank(op, "k", k, 3, "[T, K, E]")
    num_tokens, _, head_dim = q.shape
    check_shape(op, "k", k, (num_tokens, k.shape[1], head_dim))
    check_shape(op, "v", v, (num_tokens, k.shape[1], head_dim))
    check_paged_cache(op, k_cache, v_cache, head_dim)
    check_shape(op, "k_cache", k_cache, (*k_cache.shape[:2], k.shape[1], head_dim))
    check_operands(
        op,
        q=q,
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        q_norm=q_norm_weight,
        k_norm=k_norm_weight,
    )
    for name, heads in (("q", q), ("k", k), ("v", v)):
        check_heads(op, name, heads)
    check_rotation(op, q, cos, sin, q_norm_weight, k_norm_weight)
    for name, index in (("positions", positions), ("slot_mapping", slot_mapping)):
        check_index(op, name, index, num_tokens, torch.int64, q.device)


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches the offline audit compiles for an architecture (80 for sm_80)."""
    del arch
    bf16, fp32 = torch.bfloat16, torch.float32
    for label, num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, has_norm in (
        ("llama-3.1-8b decode", 1, 32, 8, 128, 128, False),
        ("llama-3.1-8b prefill", 4096, 32, 8, 128, 128, False),
        ("qwen3-8b decode", 1, 32, 8, 128, 128, True),
        ("qwen3-8b prefill", 4096, 32, 8, 128, 128, True),
        ("smollm2-135m decode", 1, 9, 3, 64, 64, False),
        ("gemma-2-9b decode", 1, 16, 8, 256, 256, False),
        ("phi-2 decode", 1, 32, 32, 80, 32, False),
        ("phi-2 prefill", 4096, 32, 32, 80, 32, False),
        ("pythia-160m decode", 1, 12, 12, 64, 16, False),
        ("pythia-2.8b decode", 1, 32, 32, 80, 20, False),
    ):
        for dtype, table_dtype in ((bf16, bf16), (bf16, fp32), (fp32, fp32)):
            vector = head_vector(head_dim, rotary_dim, dtype.itemsize, rotary_dim)
            blocks, options = head_blocks(num_tokens, head_dim, rotary_dim, vector)
            norm: Any = dtype if has_norm else None
            read = {"q_ptr": dtype, "k_ptr": dtype, "cos_ptr": table_dtype, "sin_ptr": table_dtype}
            if has_norm:
                read.update(q_norm_ptr=dtype, k_norm_ptr=dtype)
            reason = f"half of {rotary_dim} numbers is no multiple of 16 bytes"
            narrow = {
                name: NarrowRead(8 * kind.itemsize * vector, reason)
                for name, kind in read.items()
                if 8 * kind.itemsize * vector < 128
            }
            row, kv_row = num_heads * head_dim, num_kv_heads * head_dim
            pointers = (dtype,) * 3 + (table_dtype,) * 2 + (torch.int64,) * 2 + (dtype,) * 2
            numbers = (row, kv_row, kv_row, rotary_dim, 64 * kv_row, 64 * kv_row, 1e-6)
            yield LaunchCase(
                op="rope_kv_write",
                label=f"{label} {dtype} tables {table_dtype}",
                kernel=_rope_kv_write_kernel,
                args=(*pointers, norm, norm, *numbers),
                constants={
                    "NUM_HEADS": num_heads,
                    "NUM_KV_HEADS": num_kv_heads,
                    "HEAD_DIM": head_dim,
                    "ROTARY_DIM": rotary_dim,
                    "BLOCK_SIZE": 64,
                    "HAS_Q_NORM": has_norm,
                    "HAS_K_NORM": has_norm,
                    "HAS_ROPE": True,
                    "VECTOR": vector,
                    **blocks,
                    "PDL": False,
                },
                options=options,
                mma="none",
                streams=("v_ptr", *(name for name in read if name not in narrow)),
                narrow=narrow,
            )


def rope_kv_write_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """Do in torch what :func:`rope_kv_write` does.

    With tables in the dtype of q the result has the bits of HF's ``apply_rotary_pos_emb``; with
    fp32 tables the rotation is computed in fp32 and rounded once.
    """
    if q.shape[0] == 0:
        return
    if q_norm_weight is not None:
        q.copy_(_head_rms_norm(q, q_norm_weight, norm_eps))
    if k_norm_weight is not None:
        k = _head_rms_norm(k, k_norm_weight, norm_eps)
    if cos is not None and sin is not None:
        cos_t = cos.index_select(0, positions).unsqueeze(1)
        sin_t = sin.index_select(0, positions).unsqueeze(1)
        # rotate_half(x) * sin = cat(-x2, x1) * sin = cat(x2, x1) * cat(-sin1, sin2): negation is
        # exact, so it can sit in the small table instead of the heads.
        sin_t[..., : sin_t.shape[-1] // 2].neg_()
        if q.shape[0] <= _FEW_TOKENS:
            # So few heads cost by the call: rotate those of q and k together.
            heads = torch.cat((q, k), 1)
            _rotate_(heads, cos_t, sin_t)
            rotated, k = heads.split((q.shape[1], k.shape[1]), 1)
            q.copy_(rotated)
        else:
            _rotate_(q, cos_t, sin_t)
            _rotate_(k, cos_t, sin_t)
    # A list of host memory on the CPU, where the copies below refuse negative indices. On a
    # device this waits for it: there the kernel is the path that reads nothing.
    if min(slot_mapping.tolist()) < 0:
        kept = (slot_mapping >= 0).nonzero().squeeze(1)
        slot_mapping = slot_mapping[kept]
        k, v = k[kept], v[kept]
    block_size = k_cache.shape[1]
    for cache, rows in ((k_cache, k), (v_cache, v)):
        if cache.is_contiguous():
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, rows)
        else:
            cache.index_put_((slot_mapping // block_size, slot_mapping % block_size), rows)


def _head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """HF's RMS norm over the last dimension: fp32 inside, rounded, then times the weight."""
    x_fp32 = x.float()
    scale = x_fp32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return weight * x_fp32.mul_(scale).to(x.dtype)


def _rotate_(x: Tensor, cos: Tensor, signed_sin: Tensor) -> None:
    """Rotate the first ``cos.shape[-1]`` dims of each head of x [T, heads, E] in place."""
    rotary_dim = cos.shape[-1]
    if rotary_dim != x.shape[-1]:
        x = x[..., :rotary_dim]
    first, second = x.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    if cos.dtype == x.dtype:
        x.mul_(cos).add_(swapped.mul_(signed_sin))
    else:
        x.copy_(x * cos + swapped * signed_sin)
