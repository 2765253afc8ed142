"""Attention of one query a sequence over its paged keys and values."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonhybrid_kernels.attention_varlen import attention_varlen_ref

# Keys (and as many values) copied out of the pages at a time: larger copies leave the CPU's caches
# and come from fresh memory whose page faults cost more than the copy.
_GATHERED_BYTES: Final = 4 << 20


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

    Reads the lengths on the host: on the CPU a gather of the pages in use and one call of SDPA
    beat any path of fixed shape. `num_splits` and `workspace` have no meaning here.
    """
    del num_splits, workspace
    if out is None:
        out = torch.empty_like(q)
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
    lengths = context_lens.tolist()
    num_kv_heads, row_bytes = k_cache.shape[2], k_cache[0, 0].nbytes
    grouped = q.unflatten(1, (num_kv_heads, q.shape[1] // num_kv_heads))
    result = out.view_as(grouped)
    num_rows = max(1, _GATHERED_BYTES // max(1, row_bytes * max(lengths, default=0)))
    for first in range(0, len(lengths), num_rows):
        rows = slice(first, first + num_rows)
        result[rows] = _attend(
            grouped[rows],
            k_cache,
            v_cache,
            block_table[rows],
            context_lens[rows],
            lengths[rows],
            scale,
            window,
        )
    return out


def _attend(
    grouped: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of queries [B, K, G, E], whose lengths the host knows, by one call of SDPA."""
    longest, shortest = max(lengths), min(lengths)
    if longest == 0:
        return torch.zeros_like(grouped)
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_pages = -(-longest // block_size)
    pages = block_table[:, :num_pages]
    shape = (len(lengths), num_pages * block_size, num_kv_heads, head_dim)
    mask: Tensor | None = None
    if longest == shortest:
        start = 0 if window is None else max(0, longest - window)
        keys = _slots(k_cache, pages, shape)[:, start:longest]
        values = _slots(v_cache, pages, shape)[:, start:longest]
    else:
        ends = context_lens.unsqueeze(1)
        offsets = torch.arange(shape[1], device=ends.device)
        mask = used = offsets < ends
        # What a table holds past a sequence's pages is no page number, and the slots past its
        # end may hold anything: 0 * NaN is NaN, so they are cleared in the copy.
        pages = pages.where(used[:, ::block_size], 0)
        unused = used.logical_not().flatten().nonzero().squeeze(1)
        keys = _slots(k_cache, pages, shape)
        values = _slots(v_cache, pages, shape)
        keys.view(-1, num_kv_heads, head_dim).index_fill_(0, unused, 0)
        values.view(-1, num_kv_heads, head_dim).index_fill_(0, unused, 0)
        if window is not None:
            mask = mask & (offsets >= ends - window)
        if shortest == 0:
            # A row without keys sees its cleared slots: its mean of zeros is 0, not NaN.
            mask = mask | (ends == 0)
        mask = mask[:, None, None]
    # The heads of a group are the query rows of their KV head: no repeated keys.
    return F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scale
    )


def _slots(cache: Tensor, pages: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Slots [B, num_pages * S, K, E] of the pages [B, num_pages]; a view for one run of pages."""
    if pages.shape[0] == 1:
        numbers = pages[0].tolist()
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return cache[numbers[0] : numbers[0] + len(numbers)].view(shape)
    return cache.index_select(0, pages.flatten()).view(shape)
