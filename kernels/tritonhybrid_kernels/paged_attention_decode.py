"""Attention of one query a sequence over its paged keys and values, split along the keys.

    out[b] = sum_j softmax_j(scale * q[b] . k[j]) v[j],   j < context_lens[b]

A decode step reads every key and value once and computes little, so the work is cut until it
fills the device: by sequence, by KV head, and by `num_splits` ranges of keys. The G query heads
of a KV head are the rows of its matrix products. A split leaves (maximum, sum, weighted values)
in fp32, and a second kernel merges the splits in index order. The grid depends on shapes only;
lengths are read on the device, and a split without keys ends at once, so the launch can be
captured in a CUDA graph. With the same `num_splits` a row has the same bits in every batch.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023); Kwon et al.,
"PagedAttention" (arXiv:2309.06180).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.attention_tile import attend_tile, expected_mma, table_reads
from tritonhybrid_kernels.attention_varlen import attention_varlen_ref
from tritonhybrid_kernels.dependent_launch import await_predecessor
from tritonhybrid_kernels.host_decode import decode_on_host
from tritonhybrid_kernels.launch import (
    LaunchCase,
    NarrowRead,
    check_launchable,
    check_operands,
    check_shape,
    decode_options,
    require,
)
from tritonhybrid_kernels.paged_cache import check_absent, check_attention

# Multiprocessors of an H100 or H200, unless the caller knows better.
_NUM_SMS: Final = 132

# Splits that the merge loads at a time.
_MERGED_SPLITS: Final = 16


@triton.jit
def _split_range(num_keys, begin, split, num_splits, TILE: tl.constexpr):
    """Return a split's keys [first, end), whole tiles but for the last, and the splits in use."""
    tiles = (num_keys + TILE - 1) // TILE - begin // TILE
    per_split = tl.maximum((tiles + num_splits - 1) // num_splits, 1)
    first = begin // TILE * TILE + split * per_split * TILE
    used = (tiles + per_split - 1) // per_split
    return first, tl.minimum(first + per_split * TILE, num_keys), used


@triton.jit(do_not_specialize=["num_splits", "window"])
def _paged_attention_decode_kernel(
    q_ptr,  # [B, H, E]
    k_cache_ptr,  # [N, S, K, E]
    v_cache_ptr,  # [N, S, K, E]
    block_table_ptr,  # [B, MB]
    context_lens_ptr,  # [B]
    out_ptr,  # [B, H, E]
    values_ptr,  # [B, H, num_splits, E] fp32, weighted values of a split
    stats_ptr,  # [B, H, num_splits, 2] fp32, maximum and sum
    num_splits,
    stride_qb,
    stride_kn,
    stride_vn,
    stride_tb,
    stride_ob,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        await_predecessor()
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_keys = tl.load(context_lens_ptr + sequence)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(num_keys - window, 0)
    first, end, _ = _split_range(num_keys, begin, split, num_splits, TILE)
    if IS_SPLIT and first >= end:
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_e = tl.arange(0, BLOCK_E)
    head = kv_head * GROUP + offs_m
    mask_m = offs_m < GROUP
    mask = mask_m[:, None] & (offs_e[None, :] < HEAD_DIM)
    in_heads = (head * HEAD_DIM)[:, None] + offs_e[None, :]
    q = tl.load(q_ptr + sequence * stride_qb + in_heads, mask=mask, other=0.0)
    table_ptr = block_table_ptr + sequence * stride_tb
    k_ptr = k_cache_ptr + kv_head * HEAD_DIM
    v_ptr = v_cache_ptr + kv_head * HEAD_DIM
    positions = tl.zeros((BLOCK_M,), tl.int32) + (num_keys - 1)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(first, end, TILE):
        maximum, total, acc = attend_tile(
            q,
            maximum,
            total,
            acc,
            k_ptr,
            v_ptr,
            table_ptr,
            stride_kn,
            stride_vn,
            start,
            num_keys,
            positions,
            scale,
            softcap,
            window,
            HEAD_DIM,
            NUM_KV_HEADS * HEAD_DIM,
            BLOCK_SIZE,
            TILE,
            BLOCK_E,
            True,
            HAS_SOFTCAP,
            HAS_WINDOW,
        )
    if IS_SPLIT:
        part = (sequence * NUM_KV_HEADS * GROUP + head) * num_splits + split
        tl.store(values_ptr + (part * HEAD_DIM)[:, None] + offs_e[None, :], acc, mask=mask)
        tl.store(stats_ptr + part * 2, maximum, mask=mask_m)
        tl.store(stats_ptr + part * 2 + 1, total, mask=mask_m)
    else:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + sequence * stride_ob + in_heads, acc.to(q.dtype), mask=mask)


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
    _, _, used = _split_range(num_keys, begin, 0, num_splits, TILE)
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


class DecodeConfig(NamedTuple):
    """Tile sizes and compile options of a decode attention launch."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


def decode_config(group: int, head_dim: int, dtype: torch.dtype) -> DecodeConfig:
    """Choose the tiles of a launch from the query heads a KV head, E and the dtype."""
    # The matrix instruction takes 16 rows at least.
    block_m = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return DecodeConfig(block_m, 16 if head_dim > 128 else 32, 8, 2)
    # The table read before a tile takes half of the pipeline's stages: five keep two tiles of
    # keys and values in flight.
    return DecodeConfig(block_m, 32 if head_dim > 128 else 64, 4 if block_m <= 32 else 8, 5)


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


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    num_splits: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from the last token of each sequence to all its keys in the cache.

    Args:
        q: [B, H, E], the query at position ``context_lens[b] - 1``.
        k_cache: [N, S, K, E] with that token's key already written; H % K == 0.
        v_cache: [N, S, K, E].
        block_table: [B, MB] int32; entries past a sequence's last block are not read.
        context_lens: [B] int32 keys a sequence; 0 for a padding row, which reads no block.
        scale: factor of the scores.
        num_splits: ranges the keys are split into; chosen from shapes if None. Rows have the
            same bits in every batch that uses the same number.
        window: keys the query sees, its own among them; None for all.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: no Triton kernel yet, must be None.
        alibi_slopes: no Triton kernel yet, must be None.
        workspace: fp32 memory of :func:`workspace_size` elements; allocated if None.
        out: [B, H, E] to write to; allocated if None.

    Returns:
        [B, H, E]; zeros for a padding row.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride is not as above.
    """
    op = "paged_attention_decode"
    check_absent(op, sinks=sinks, alibi_slopes=alibi_slopes)
    check_operands(op, q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    check_attention(op, q, k_cache, v_cache, block_table, context_lens, window, softcap)
    batch, num_heads, head_dim = q.shape
    check_shape(op, "block_table", block_table, (batch, block_table.shape[1]))
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_shape(op, "out", out, (batch, num_heads, head_dim))
    require(
        out[:1].is_contiguous(),
        f"{op}: the heads of out must follow each other",
        "contiguous [H, E]",
        f"strides {out.stride()}",
        "Allocate out as [B, H, E].",
    )
    if batch == 0:
        return out
    check_launchable(op, q.device)
    num_kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
    group = num_heads // num_kv_heads
    config = decode_config(group, head_dim, q.dtype)
    if num_splits is None:
        num_splits = num_splits_for(
            batch, num_kv_heads, block_table.shape[1] * block_size, config.tile
        )
    require(
        num_splits >= 1,
        f"{op}: the keys are split into one range at least",
        ">= 1",
        num_splits,
        "Pass None to have it chosen.",
    )
    size = workspace_size(batch, num_heads, head_dim, num_splits)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    require(
        workspace.dtype == torch.float32
        and workspace.device == q.device
        and workspace.is_contiguous()
        and workspace.numel() >= size,
        f"{op}: the workspace must hold the partial results",
        f"{size} contiguous float32 on {q.device}",
        f"{workspace.numel()} {workspace.dtype} on {workspace.device}",
        "Allocate workspace_size(...) elements.",
    )
    values, stats = workspace, workspace[size - size // (head_dim + 2) * 2 :]
    constants = _constants(config, group, num_kv_heads, head_dim, block_size, softcap, window)
    _paged_attention_decode_kernel[(batch, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        out,
        values,
        stats,
        num_splits,
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        block_table.stride(0),
        out.stride(0),
        scale,
        softcap or 0.0,
        window or 0,
        **constants,
        IS_SPLIT=num_splits > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **decode_options(q.device),
    )
    if num_splits > 1:
        _merge_splits_kernel[(batch, num_heads)](
            values,
            stats,
            context_lens,
            out,
            num_splits,
            out.stride(0),
            window or 0,
            HEAD_DIM=head_dim,
            TILE=config.tile,
            BLOCK_E=constants["BLOCK_E"],
            BLOCK_S=_MERGED_SPLITS,
            HAS_WINDOW=window is not None,
            num_warps=4,
            **decode_options(q.device),
        )
    return out


def _constants(
    config: DecodeConfig,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    softcap: float | None,
    window: int | None,
) -> dict[str, Any]:
    return {
        "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": config.block_m,
        "TILE": config.tile,
        "BLOCK_E": triton.next_power_of_2(head_dim),
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": window is not None,
    }


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches the offline audit compiles for an architecture (80 for sm_80)."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for label, dtype, group, head_dim, block_size, is_split, softcap, window in (
        ("llama-3.1-8b", bf16, 4, 128, 64, True, None, None),
        ("llama-3.1-8b one split", bf16, 4, 128, 64, False, None, None),
        ("llama-3.1-8b blocks of 16", bf16, 4, 128, 16, True, None, None),
        ("llama-3.1-8b fp32", fp32, 4, 128, 64, True, None, None),
        ("gemma-2-9b fp32", fp32, 2, 256, 64, True, 50.0, 4096),
        ("falcon-7b", bf16, 71, 64, 64, True, None, None),
        ("smollm2-135m", bf16, 3, 64, 64, True, None, None),
        ("phi-2 head of 80", bf16, 1, 80, 64, True, None, None),
        ("gemma-2-9b", bf16, 2, 256, 64, True, 50.0, 4096),
    ):
        config = decode_config(group, head_dim, dtype)
        row, slot = 8 * group * head_dim, 8 * head_dim
        yield LaunchCase(
            op="paged_attention_decode",
            label=label,
            kernel=_paged_attention_decode_kernel,
            args=(
                *(dtype, dtype, dtype, torch.int32, torch.int32, dtype, fp32, fp32),
                *(33, row, block_size * slot, block_size * slot, 128, row),
                *(0.125, softcap or 0.0, window or 0),
            ),
            constants={
                **_constants(config, group, 8, head_dim, block_size, softcap, window),
                "IS_SPLIT": is_split,
                "PDL": False,
            },
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            mma=expected_mma(dtype, config.block_m, arch),
            streams=("q_ptr", "k_cache_ptr", "v_cache_ptr"),
            narrow=table_reads(block_size, config.tile),
        )
    for head_dim in (64, 128):
        yield LaunchCase(
            op="paged_attention_decode",
            label=f"merge of {head_dim} columns",
            kernel=_merge_splits_kernel,
            args=(fp32, fp32, torch.int32, bf16, 33, 32 * head_dim, 0),
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


def paged_attention_decode_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    num_splits: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Do in torch what :func:`paged_attention_decode` does, with sinks and ALiBi as well.

    Reads tables and lengths on the host: on the CPU pages read in place, or else copied, and one
    call of SDPA beat any path of fixed shape. `num_splits` and `workspace` have no meaning here.
    """
    del num_splits, workspace
    if softcap is not None or sinks is not None or alibi_slopes is not None:
        return attention_varlen_ref(
            q,
            k_cache,
            v_cache,
            block_table,
            torch.arange(q.shape[0] + 1, dtype=torch.int32),
            context_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            out=out,
        )
    return decode_on_host(q, k_cache, v_cache, block_table, context_lens, scale, window, out)
