"""The step that attention is made of: one tile of keys and values taken into an online softmax.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonhybrid_kernels.softcap import softcap_fp32


@triton.jit
def attend_tile(
    q,  # [BLOCK_M, BLOCK_E]
    maximum,  # [BLOCK_M] running row maximum, base 2
    total,  # [BLOCK_M] running sum of weights
    acc,  # [BLOCK_M, BLOCK_E] fp32
    k_ptr,  # [N, S, K, E] at a KV head
    v_ptr,  # [N, S, K, E] at a KV head
    table_ptr,  # a sequence's row of the block table
    stride_kn,
    stride_vn,
    start,
    num_keys,
    positions,  # [BLOCK_M] of the rows' queries
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Take the keys [start, start + TILE) into the online softmax of each row."""
    offs_e = tl.arange(0, BLOCK_E)
    keys = start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        # The tile lies in one block: one scalar read of the table.
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        slots = (keys % BLOCK_SIZE) * STRIDE_SLOT
    else:
        # Past the last key the table holds no block number.
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < num_keys, other=0).to(tl.int64)
        slots = (keys % BLOCK_SIZE) * STRIDE_SLOT
    k_ptrs = k_ptr + (block * stride_kn + slots)[:, None] + offs_e[None, :]
    v_ptrs = v_ptr + (block * stride_vn + slots)[:, None] + offs_e[None, :]
    in_head = offs_e[None, :] < HEAD_DIM
    if MASKED:
        readable = (keys < num_keys)[:, None] & in_head
        k = tl.load(k_ptrs, mask=readable, other=0.0)
        v = tl.load(v_ptrs, mask=readable, other=0.0)
    elif HEAD_DIM == BLOCK_E:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=in_head, other=0.0)
        v = tl.load(v_ptrs, mask=in_head, other=0.0)
    # Scaled after the product, in fp32: a pre-scaled bf16 q would be rounded once more.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = softcap_fp32(scores, softcap)
    scores *= 1.4426950408889634
    if MASKED:
        visible = keys[None, :] <= positions[:, None]
        if HAS_WINDOW:
            visible &= positions[:, None] - keys[None, :] < window
        scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # A row that has seen no key yet has the maximum -inf, and -inf - -inf is NaN.
    safe_maximum = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - safe_maximum[:, None])
    decay = tl.exp2(maximum - safe_maximum)
    total = total * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_maximum, total, acc
