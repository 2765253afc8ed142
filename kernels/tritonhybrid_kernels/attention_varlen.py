"""Causal attention of packed queries of many sequences over their paged keys and values.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   j <= i,  i - j < window

Queries are the last positions of their sequence: a sequence may start with keys that an earlier
call (or another sequence) left in its pages. A program takes BLOCK_Q neighbouring queries of one
sequence and all G heads of one KV head as the rows of its matrix products, so a key tile is read
once a group. The grid is bounded by ``T // BLOCK_Q + B`` and each program searches its sequence
in `cu_seqlens_q`: no length is read on the host. Tiles that no row can see only in part run
without masks. Softmax is online, in fp32 and base 2.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691); Kwon et al., "PagedAttention"
(arXiv:2309.06180).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.attention_config import AttentionConfig, attention_config
from tritonhybrid_kernels.attention_tile import attend_tile
from tritonhybrid_kernels.launch import LaunchCase, check_launchable, device_arch, launch_options
from tritonhybrid_kernels.paged_cache import (
    attention_numbers,
    check_attention,
    check_index,
    refuse_features,
)


@triton.jit
def _find_sequence(cu_seqlens_ptr, pid, num_seqs, BLOCK_Q: tl.constexpr):
    """Return the last sequence whose first program, ``cu // BLOCK_Q + index``, is <= pid."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle <= pid:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_seqs", "window"])
def _attention_varlen_kernel(
    q_ptr,  # [T, H, E]
    k_cache_ptr,  # [N, S, K, E]
    v_cache_ptr,  # [N, S, K, E]
    block_table_ptr,  # [B, MB]
    cu_seqlens_ptr,  # [B + 1]
    context_lens_ptr,  # [B]
    out_ptr,  # [T, H, E]
    num_seqs,
    stride_qt,
    stride_kn,
    stride_vn,
    stride_tb,
    stride_ot,
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
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    pid = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _find_sequence(cu_seqlens_ptr, pid, num_seqs, BLOCK_Q)
    first_row = tl.load(cu_seqlens_ptr + sequence)
    num_queries = tl.load(cu_seqlens_ptr + sequence + 1) - first_row
    first_query = (pid - first_row // BLOCK_Q - sequence) * BLOCK_Q
    if first_query >= num_queries:
        return
    num_keys = tl.load(context_lens_ptr + sequence)
    offs_m = tl.arange(0, BLOCK_M)
    offs_e = tl.arange(0, BLOCK_E)
    query = first_query + offs_m // GROUP
    head = kv_head * GROUP + offs_m % GROUP
    mask_m = (offs_m < BLOCK_Q * GROUP) & (query < num_queries)
    mask = mask_m[:, None] & (offs_e[None, :] < HEAD_DIM)
    rows = (first_row + query).to(tl.int64)
    q_ptrs = q_ptr + (rows * stride_qt + head * HEAD_DIM)[:, None] + offs_e[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    first_position = num_keys - num_queries + first_query
    last_position = tl.minimum(first_position + BLOCK_Q, num_keys) - 1
    # Rows past the end stay at the last position, so that no row sees more than its program.
    positions = tl.minimum(first_position + offs_m // GROUP, last_position)

    table_ptr = block_table_ptr + sequence.to(tl.int64) * stride_tb
    k_ptr = k_cache_ptr + kv_head * HEAD_DIM
    v_ptr = v_cache_ptr + kv_head * HEAD_DIM
    STRIDE_SLOT: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    # Tiles start at multiples of TILE whatever the queries, so a row's sums have one order.
    begin = 0
    whole_begin = 0
    end = last_position + 1
    whole_end = tl.maximum(first_position + 1, 0) // TILE * TILE
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // TILE * TILE
        whole_begin = (tl.maximum(last_position - window + 1, 0) + TILE - 1) // TILE * TILE
        whole_begin = tl.minimum(whole_begin, (end + TILE - 1) // TILE * TILE)
        whole_end = tl.maximum(whole_begin, whole_end)
    # Three ranges of tiles: cut by the window's edge, seen whole by every row, cut by the diagonal.
    for part in tl.static_range(0 if HAS_WINDOW else 1, 3):
        first = begin if part == 0 else whole_begin if part == 1 else whole_end
        last = whole_begin if part == 0 else whole_end if part == 1 else end
        for start in range(first, last, TILE):
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
                STRIDE_SLOT,
                BLOCK_SIZE,
                TILE,
                BLOCK_E,
                part != 1,
                HAS_SOFTCAP,
                HAS_WINDOW,
            )
    # Only a sequence without keys has rows that saw none.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_ptrs = out_ptr + (rows * stride_ot + head * HEAD_DIM)[:, None] + offs_e[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def attention_varlen(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    max_seqlen_q: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    out: Tensor | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attend from packed queries to the keys their sequences have in the cache.

    Args:
        q: [T, H, E], T queries of all sequences one after another.
        k_cache: [N, S, K, E] with the keys of these queries already written; H % K == 0.
        v_cache: [N, S, K, E].
        block_table: [B, MB] int32; entries past a sequence's last block are not read.
        cu_seqlens_q: [B + 1] int32, first row of each sequence in q, and T.
        context_lens: [B] int32 keys a sequence; its queries are the last of these positions.
        scale: factor of the scores.
        max_seqlen_q: most queries of a sequence, if the host knows; chooses tiles, no more.
        window: a query at i sees the keys j with i - j < window; None for all.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: no Triton kernel yet, must be None.
        alibi_slopes: no Triton kernel yet, must be None.
        out: [T, H, E] to write to; allocated if None.
        config: tiles to use instead of the heuristic's.

    Returns:
        [T, H, E]; zeros for the queries of a sequence without keys.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride is not as above.
    """
    op = "attention_varlen"
    refuse_features(op, sinks=sinks, alibi_slopes=alibi_slopes)
    check_attention(op, q, k_cache, v_cache, block_table, context_lens, out, window, softcap)
    num_seqs = block_table.shape[0]
    check_index(op, "cu_seqlens_q", cu_seqlens_q, num_seqs + 1, torch.int32, q.device)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens == 0:
        return out
    check_launchable(op, q.device)
    num_kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
    group = num_heads // num_kv_heads
    max_rows = None if max_seqlen_q is None else max_seqlen_q * group
    config = config or attention_config(max_rows, group, head_dim, q.dtype, device_arch(q.device))
    grid = (num_tokens // (config.block_m // group) + num_seqs, num_kv_heads)
    _attention_varlen_kernel[grid](
        q,
        k_cache,
        v_cache,
        block_table,
        cu_seqlens_q,
        context_lens,
        out,
        num_seqs,
        *attention_numbers(q, k_cache, v_cache, block_table, out, scale, window, softcap),
        **config.constants(group, num_kv_heads, head_dim, block_size, softcap, window),
        **config.options,
        **launch_options(q.device),
    )
    return out


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches the offline audit compiles for an architecture (80 for sm_80)."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for label, dtype, group, head_dim, block_size, max_rows, softcap, window in (
        ("llama-3.1-8b", bf16, 4, 128, 64, None, None, None),
        ("llama-3.1-8b blocks of 16", bf16, 4, 128, 16, None, None, None),
        ("llama-3.1-8b short prompts", bf16, 4, 128, 64, 64, None, None),
        ("llama-3.1-8b one query", bf16, 4, 128, 64, 4, None, None),
        ("llama-3.1-8b fp32", fp32, 4, 128, 64, None, None, None),
        ("gemma-2-9b fp32", fp32, 2, 256, 64, None, 50.0, 4096),
        ("smollm2-135m", bf16, 3, 64, 64, None, None, None),
        ("phi-2 head of 80", bf16, 1, 80, 64, None, None, None),
        ("gemma-2-9b", bf16, 2, 256, 64, None, 50.0, 4096),
    ):
        config = attention_config(max_rows, group, head_dim, dtype, arch)
        row, slot = 8 * group * head_dim, 8 * head_dim
        yield LaunchCase(
            op="attention_varlen",
            label=label,
            kernel=_attention_varlen_kernel,
            args=(
                *(dtype, dtype, dtype, torch.int32, torch.int32, torch.int32, dtype),
                *(17, row, block_size * slot, block_size * slot, 128, row),
                *(0.125, softcap or 0.0, window or 0),
            ),
            constants=config.constants(group, 8, head_dim, block_size, softcap, window),
            options=config.options,
            mma=config.expected_mma(dtype, arch),
            streams=("q_ptr", "k_cache_ptr", "v_cache_ptr"),
            narrow=config.table_reads(block_size),
        )


def attention_varlen_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    max_seqlen_q: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Do in torch what :func:`attention_varlen` does, with sinks and ALiBi as well.

    Reads the lengths on the host. Plain and windowed attention go through torch's SDPA; softcap,
    sinks and ALiBi through scores and softmax in fp32. `sinks` [H] are logits of a key without
    value that every query of a head also attends to; `alibi_slopes` [H] add ``-slope * (i - j)``
    to the score of query i and key j.
    """
    del max_seqlen_q
    if out is None:
        out = torch.empty_like(q)
    lengths = [end - start for start, end in pairwise(cu_seqlens_q.tolist())]
    shapes = list(zip(lengths, context_lens.tolist(), strict=True))
    explicit = softcap is not None or sinks is not None or alibi_slopes is not None
    first_seq = first_row = 0
    # Neighbours of equal shape, the common case in a rollout, share one call.
    for (num_queries, num_keys), run in groupby(shapes):
        num_seqs = len(list(run))
        rows = slice(first_row, first_row + num_seqs * num_queries)
        tables = block_table[first_seq : first_seq + num_seqs]
        first_seq += num_seqs
        first_row = rows.stop
        if num_queries == 0:
            continue
        if num_keys == 0:
            out[rows] = 0
            continue
        queries = q[rows].unflatten(0, (num_seqs, num_queries)).transpose(1, 2)
        keys = _gather_pages(k_cache, tables, num_keys)
        values = _gather_pages(v_cache, tables, num_keys)
        if explicit:
            result = _explicit_attention(
                queries, keys, values, scale, window, softcap, sinks, alibi_slopes
            )
        else:
            is_causal = num_queries == num_keys and (window is None or window >= num_keys)
            mask = None
            if not is_causal and (num_queries > 1 or window is not None):
                mask = _visible(num_queries, num_keys, window, q.device)
            result = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=is_causal and num_queries > 1,
                scale=scale,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
        out[rows] = result.transpose(1, 2).flatten(0, 1)
    return out


def _gather_pages(cache: Tensor, tables: Tensor, num_keys: int) -> Tensor:
    """Copy the first `num_keys` slots of each sequence out of its pages: [B, K, num_keys, E]."""
    num_pages = -(-num_keys // cache.shape[1])
    pages = cache.index_select(0, tables[:, :num_pages].flatten())
    slots = pages.view(tables.shape[0], num_pages * cache.shape[1], *cache.shape[2:])
    return slots[:, :num_keys].transpose(1, 2)


def _distance(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Position of query minus position of key [num_queries, num_keys]; queries come last."""
    query_pos = torch.arange(num_keys - num_queries, num_keys, device=device)
    return query_pos.unsqueeze(1) - torch.arange(num_keys, device=device)


def _visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Mask [num_queries, num_keys] of the keys a query attends to."""
    distance = _distance(num_queries, num_keys, device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _explicit_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Attention [B, H, n, E] over [B, K, num_keys, E] by scores and softmax in fp32."""
    num_queries, num_keys = queries.shape[2], keys.shape[2]
    grouped = queries.unflatten(1, (keys.shape[1], -1)).float() * scale
    scores = (grouped @ keys.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if alibi_slopes is not None:
        distance = _distance(num_queries, num_keys, queries.device)
        scores = scores - alibi_slopes.float()[:, None, None] * distance
    visible = _visible(num_queries, num_keys, window, queries.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    probs = scores.softmax(-1)[..., :num_keys].unflatten(1, (keys.shape[1], -1))
    result: Tensor = (probs @ values.float().unsqueeze(2)).flatten(1, 2).to(queries.dtype)
    return result
