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

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.attention_config import decode_config
from tritonhybrid_kernels.attention_tile import attend_tile
from tritonhybrid_kernels.attention_varlen import attention_varlen_ref
from tritonhybrid_kernels.dependent_launch import await_predecessor
from tritonhybrid_kernels.host_decode import decode_on_host
from tritonhybrid_kernels.key_splits import (
    merge_cases,
    merge_splits,
    num_splits_for,
    split_range,
    workspace_size,
)
from tritonhybrid_kernels.launch import (
    LaunchCase,
    check_launchable,
    check_shape,
    decode_options,
    require,
)
from tritonhybrid_kernels.paged_cache import (
    attention_numbers,
    check_attention,
    refuse_features,
)


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
    first, end, _ = split_range(num_keys, begin, split, num_splits, TILE)
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
    refuse_features(op, sinks=sinks, alibi_slopes=alibi_slopes)
    check_attention(op, q, k_cache, v_cache, block_table, context_lens, out, window, softcap)
    batch, num_heads, head_dim = q.shape
    check_shape(op, "block_table", block_table, (batch, block_table.shape[1]))
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
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
        *attention_numbers(q, k_cache, v_cache, block_table, out, scale, window, softcap),
        **config.constants(group, num_kv_heads, head_dim, block_size, softcap, window),
        IS_SPLIT=num_splits > 1,
        **config.options,
        **decode_options(q.device),
    )
    if num_splits > 1:
        merge_splits(values, stats, context_lens, out, num_splits, config.tile, window)
    return out


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
                **config.constants(group, 8, head_dim, block_size, softcap, window),
                "IS_SPLIT": is_split,
                "PDL": False,
            },
            options=config.options,
            mma=config.expected_mma(dtype, arch),
            streams=("q_ptr", "k_cache_ptr", "v_cache_ptr"),
            narrow=config.table_reads(block_size),
        )
    yield from merge_cases()


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
