"""Causal attention of packed queries of many sequences over their paged keys and values."""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return (probs @ values.float().unsqueeze(2)).flatten(1, 2).to(queries.dtype)
