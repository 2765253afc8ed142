"""Ranges into which a decode step splits a sequence's keys, and the merge of their results.

A split leaves the maximum of its scores, the sum of its weights and its weighted values, in fp32.
They are merged in index order, so a row's bits depend on the number of splits and on nothing else.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.dependent_launch import await_predecessor
from tritonhybrid_kernels.launch import LaunchCase, NarrowRead, decode_options

# Multiprocessors of an H100 or H200, unless the caller knows better.
_NUM_SMS: Final = 132

# Splits that the merge loads at a time.
_MERGED_SPLITS: Final = 16


@triton.jit
def split_range(num_keys, begin, split, num_splits, TILE: tl.constexpr):
    """Return a split's keys [first, end), whole tiles but for the last, and the splits in use."""
    tiles = (num_keys + TILE - 1) // TILE - begin // TILE
    per_split = tl.maximum((tiles + num_splits - 1) // num_splits, 1)
    first = begin // TILE * TILE + split * per_split * TILE
    used = (tiles + per_split - 1) // per_split
    return first, tl.minimum(first + per_split * TILE, num_keys), used


@triton.jit(do_not_specialize=["num_splits", "window"])
def _merge_splits_kernel(
    values_ptr,  # [B, H, num_splits, E] fp32
    stats_ptr,  # [B, H, num_splits, 2] fp32
    context_lens_ptr,  # [B]
    out_ptr,  # [B, H, E]
    num_splits,
    stride_ob,
    window,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        await_predecessor()
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_keys = tl.load(context_lens_ptr + sequence)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(num_keys - window, 0)
    _, _, used = split_range(num_keys, begin, 0, num_splits, TILE)
    offs_s = tl.arange(0, BLOCK_S)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < HEAD_DIM
    part = (sequence * tl.num_programs(1) + head) * num_splits
    maximum = float("-inf")
    total = 0.0
    acc = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, used, BLOCK_S):
        splits = part + first + offs_s
        is_used = first + offs_s < used
        split_maximum = tl.load(stats_ptr + splits * 2, mask=is_used, other=float("-inf"))
        split_total = tl.load(stats_ptr + splits * 2 + 1, mask=is_used, other=0.0)
        values = tl.load(
            values_ptr + (splits * HEAD_DIM)[:, None] + offs_e[None, :],
            mask=is_used[:, None] & mask_e[None, :],
            other=0.0,
        )
        new_maximum = tl.maximum(maximum, tl.max(split_maximum, axis=0))
        # Every split in use has seen a key, so the maximum is finite unless a score is not.
        weights = tl.exp2(split_maximum - new_maximum)
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(split_total * weights, axis=0)
        acc = acc * decay + tl.sum(values * weights[:, None], axis=0)
        maximum = new_maximum
    acc = acc / tl.where(total > 0, total, 1.0)
    out_ptrs = out_ptr + sequence * stride_ob + head * HEAD_DIM + offs_e
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_e)


def merge_splits(
    values: Tensor,
    stats: Tensor,
    context_lens: Tensor,
    out: Tensor,
    num_splits: int,
    tile: int,
    window: int | None,
) -> None:
    """Merge what a launch's splits have left into its result.

    Args:
        values: fp32 of B * H * num_splits * E elements, weighted values.
        stats: fp32 of B * H * num_splits * 2 elements, maximum and sum.
        context_lens: [B] int32 keys a sequence; where it is 0 the result is 0.
        out: [B, H, E], written.
        num_splits: of the launch, as `tile` and `window` are: they tell which splits have keys.
        tile: keys a step of the launch took.
        window: keys the query sees, or None for all.
    """
    batch, num_heads, head_dim = out.shape
    _merge_splits_kernel[(batch, num_heads)](
        values,
        stats,
        context_lens,
        out,
        num_splits,
        out.stride(0),
        window or 0,
        HEAD_DIM=head_dim,
        TILE=tile,
        BLOCK_E=triton.next_power_of_2(head_dim),
        BLOCK_S=_MERGED_SPLITS,
        HAS_WINDOW=window is not None,
        num_warps=4,
        **decode_options(out.device),
    )


def num_splits_for(
    batch: int, num_kv_heads: int, max_keys: int, tile: int, num_sms: int = _NUM_SMS
) -> int:
    """Choose into how many ranges the keys of a sequence are split, from shapes only.

    Args:
        batch: B.
        num_kv_heads: K.
        max_keys: slots a row of the block table can name, MB * S.
        tile: keys a step of the kernel takes.
        num_sms: multiprocessors of the device.
    """
    # Twice as many programs as multiprocessors hides the latency of one's loads behind another's
    # and evens out unequal lengths; a split holds a tile at least.
    wanted = -(-2 * num_sms // max(1, batch * num_kv_heads))
    return max(1, min(wanted, -(-max_keys // tile)))


def workspace_size(batch: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Return the fp32 elements of the partial results of a launch; 0 without splits."""
    return batch * num_heads * num_splits * (head_dim + 2) if num_splits > 1 else 0


def merge_cases() -> Iterator[LaunchCase]:
    """Yield the launches of the merge that the offline audit compiles."""
    fp32 = torch.float32
    for head_dim in (64, 128):
        yield LaunchCase(
            op="paged_attention_decode",
            label=f"merge of {head_dim} columns",
            kernel=_merge_splits_kernel,
            args=(fp32, fp32, torch.int32, torch.bfloat16, 33, 32 * head_dim, 0),
            constants={
                "HEAD_DIM": head_dim,
                "TILE": 64,
                "BLOCK_E": head_dim,
                "BLOCK_S": _MERGED_SPLITS,
                "HAS_WINDOW": False,
                "PDL": False,
            },
            options={"num_warps": 4},
            mma="none",
            streams=("values_ptr",),
            narrow={"stats_ptr": NarrowRead(32, "two numbers a split, beside its row of values")},
        )
