"""Decode attention over pages on the CPU, copying as few of them as it can.

A copy of the pages costs more than the attention itself, so runs of neighbouring pages are read
in place, and pages that several sequences share (the samples of one prompt) are attended once for
all of them: softmax over a union of keys is the mean of the parts' results, weighted by the
exponentials of their log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Keys (and as many values) copied out of the pages at a time: larger copies leave the CPU's caches
# and come from fresh memory whose page faults cost more than the copy.
_GATHERED_BYTES: Final = 4 << 20
# A call of SDPA costs as much as copying about this many bytes of keys.
_CALL_BYTES: Final = 96 << 10
# Fewer shared keys than this are not worth the merge.
_LEAST_SHARED: Final = 128


@dataclass(frozen=True)
class Pages:
    """The key and value pages of one layer and the tables of a batch, all known to the host.

    Attributes:
        k: keys [N, S, K, E], contiguous.
        v: values [N, S, K, E], contiguous.
        tables: page numbers a sequence; what follows its last page is arbitrary.
        lengths: keys a sequence has.
    """

    k: Tensor
    v: Tensor
    tables: list[list[int]]
    lengths: list[int]

    @property
    def block_size(self) -> int:
        """Tokens a page holds."""
        return self.k.shape[1]

    def run(self, row: int, first_page: int) -> int | None:
        """First slot of a row's pages from `first_page` on, if they are neighbours."""
        table = self.tables[row]
        last = -(-self.lengths[row] // self.block_size)
        start = table[first_page]
        if table[first_page:last] != list(range(start, start + last - first_page)):
            return None
        return start * self.block_size

    def slots(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, K, count, E] of neighbouring slots, read in place."""
        keys, values = (
            cache.view(-1, *cache.shape[2:])[first : first + count].transpose(0, 1).unsqueeze(0)
            for cache in (self.k, self.v)
        )
        return keys, values

    def strided(self, first: int, step: int, rows: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, K, count, E] of runs that lie `step` slots apart, in place."""
        num_heads, head_dim = self.k.shape[2:]
        width = num_heads * head_dim
        keys, values = (
            cache.as_strided(
                (rows, num_heads, count, head_dim),
                (step * width, head_dim, width, 1),
                cache.storage_offset() + first * width,
            )
            for cache in (self.k, self.v)
        )
        return keys, values

    def gathered(self, row: int, first_page: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, K, count, E] of a row from `first_page` on, copied."""
        last = -(-self.lengths[row] // self.block_size)
        pages = torch.tensor(self.tables[row][first_page:last])
        count = self.lengths[row] - first_page * self.block_size
        keys, values = (
            cache.index_select(0, pages).flatten(0, 1)[:count].transpose(0, 1).unsqueeze(0)
            for cache in (self.k, self.v)
        )
        return keys, values


def decode_on_host(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None,
    out: Tensor | None,
) -> Tensor:
    """Decode attention with tables and lengths read on the host.

    Args:
        q: [B, H, E].
        k_cache: [N, S, K, E].
        v_cache: [N, S, K, E].
        block_table: [B, MB] int32.
        context_lens: [B] int32; a row of length 0 gives zeros.
        scale: factor on the scores.
        window: keys a query sees, or None for all.
        out: [B, H, E] to write to, or None.

    Returns:
        [B, H, E].
    """
    if q.shape[0] == 0:
        return torch.empty_like(q) if out is None else out
    lengths = context_lens.tolist()
    num_kv_heads = k_cache.shape[2]
    grouped = q.unflatten(1, (num_kv_heads, q.shape[1] // num_kv_heads))
    plain = [range(len(lengths))]
    groups: list[tuple[range, int]] = []
    pages = None
    if _reads_in_place(k_cache, v_cache):
        pages = Pages(k_cache, v_cache, block_table.tolist(), lengths)
        if window is None:
            groups, plain = shared_groups(pages)
        if not groups and out is None and all(lengths):
            whole = attend_in_place(grouped, pages, plain[0], scale, window)
            if whole is not None:
                return whole.reshape(q.shape)
    out = torch.empty_like(q) if out is None else out
    result = out.view_as(grouped)
    for rows, shared in groups:
        assert pages is not None
        part = slice(rows.start, rows.stop)
        result[part] = attend_shared(grouped[part], pages, rows, shared, scale)
    for rows in plain:
        attended = None
        if pages is not None and all(lengths[row] for row in rows):
            queries = grouped[rows.start : rows.stop]
            attended = attend_in_place(queries, pages, rows, scale, window)
        if attended is not None:
            result[rows.start : rows.stop] = attended
            continue
        longest = max((lengths[row] for row in rows), default=0)
        num_rows = rows_per_copy(longest, k_cache[0, 0].nbytes)
        for start in range(rows.start, rows.stop, num_rows):
            part = slice(start, min(start + num_rows, rows.stop))
            result[part] = _attend_copies(
                grouped[part],
                k_cache,
                v_cache,
                block_table[part],
                context_lens[part],
                lengths[part],
                scale,
                window,
            )
    return out


def _reads_in_place(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the pages are the CPU's, and laid out so that runs of them are views."""
    return (
        k_cache.device.type == "cpu"
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and k_cache.shape == v_cache.shape
    )


def shared_groups(pages: Pages) -> tuple[list[tuple[range, int]], list[range]]:
    """Split a batch into rows that begin with the same pages and rows that do not.

    Returns:
        The groups, each with how many whole pages its rows share (every row has at least one
        key beyond them), and the runs of remaining rows.
    """
    tables, lengths, size = pages.tables, pages.lengths, pages.block_size
    groups: list[tuple[range, int]] = []
    plain: list[range] = []
    row = 0
    while row < len(tables):
        end = row + 1
        shared = max(lengths[row] - 1, 0) // size
        while end < len(tables) and shared * size >= _LEAST_SHARED:
            own = max(lengths[end] - 1, 0) // size
            common = _common(tables[row], tables[end], min(shared, own))
            if common * size < _LEAST_SHARED:
                break
            shared = common
            end += 1
        if end - row > 1:
            groups.append((range(row, end), shared))
        elif plain and plain[-1].stop == row:
            plain[-1] = range(plain[-1].start, end)
        else:
            plain.append(range(row, end))
        row = end
    return groups, plain


def _common(left: list[int], right: list[int], most: int) -> int:
    if left[:most] == right[:most]:
        return most
    return next(index for index in range(most) if left[index] != right[index])


def attend_shared(q: Tensor, pages: Pages, rows: range, shared: int, scale: float) -> Tensor:
    """Attention of rows whose first `shared` pages are the same ones.

    Args:
        q: queries of these rows [g, K, G, E].
        pages: of the whole batch.
        rows: which rows of the batch these are.
        shared: whole pages in common; every row has keys beyond them.
        scale: factor on the scores.

    Returns:
        [g, K, G, E].
    """
    num_rows, num_heads, group, head_dim = q.shape
    together = q.transpose(0, 1).reshape(1, num_heads, num_rows * group, head_dim)
    prefix = Pages(pages.k, pages.v, [pages.tables[rows[0]]], [shared * pages.block_size])
    start = prefix.run(0, 0)
    keys, values = (
        prefix.slots(start, prefix.lengths[0]) if start is not None else prefix.gathered(0, 0)
    )
    out, lse = _attend_with_lse(together, keys, values, scale)
    head = out.view(num_heads, num_rows, group, head_dim).transpose(0, 1)
    head_lse = lse.view(num_heads, num_rows, group).transpose(0, 1)
    tail, tail_lse = _attend_own(q, pages, rows, shared, scale)
    weight = torch.sigmoid(head_lse - tail_lse).unsqueeze(-1)
    # lerp in fp32: the parts are already rounded, their mean is rounded once more.
    return torch.lerp(tail.float(), head.float(), weight).to(q.dtype)


def attend_in_place(
    q: Tensor, pages: Pages, rows: range, scale: float, window: int | None
) -> Tensor | None:
    """Attention of rows that share nothing, without a copy; None where copying is cheaper.

    Args:
        q: queries of these rows [B, K, G, E].
        pages: of the whole batch.
        rows: which rows of the batch these are; all have keys.
        scale: factor on the scores.
        window: keys a query sees, or None for all.
    """
    if len(rows) == 1:
        start = pages.run(rows.start, 0)
        if start is None:
            return None
        count = pages.lengths[rows.start]
        skip = 0 if window is None else max(0, count - window)
        keys, values = pages.strided(start + skip, 0, 1, count - skip)
        return _attend(q, keys, values, scale)
    starts = [pages.run(row, 0) for row in rows]
    if any(start is None for start in starts):
        return None
    lengths = [pages.lengths[row] for row in rows]
    skips = [0 if window is None else max(0, length - window) for length in lengths]
    firsts = [start + skip for start, skip in zip(starts, skips, strict=True) if start is not None]
    counts = [length - skip for length, skip in zip(lengths, skips, strict=True)]
    parts = evenly_spaced(firsts, counts)
    if len(parts) > 1 and sum(counts) * pages.k[0, 0].nbytes < len(parts) * _CALL_BYTES:
        return None
    results = []
    for part in parts:
        step = firsts[part.start + 1] - firsts[part.start] if len(part) > 1 else 0
        keys, values = pages.strided(firsts[part.start], step, len(part), counts[part.start])
        queries = q[part.start : part.stop]
        results.append(_attend(queries, keys, values, scale))
    return results[0] if len(results) == 1 else torch.cat(results)


def evenly_spaced(firsts: list[int], counts: list[int]) -> list[range]:
    """Cut rows into runs whose first slots lie evenly apart, ascending, and count as many.

    Two rows always lie evenly apart, so what is left of a batch after its short sequences have
    ended still needs at most half as many calls as rows, if their lengths are one.
    """
    parts: list[range] = []
    start = 0
    while start < len(firsts):
        end = start + 1
        while (
            end < len(firsts)
            and counts[end] == counts[start]
            and firsts[end] >= firsts[end - 1]
            and firsts[end] - firsts[end - 1] == firsts[start + 1] - firsts[start]
        ):
            end += 1
        parts.append(range(start, end))
        start = end
    return parts


def rows_per_copy(longest: int, row_bytes: int) -> int:
    """How many sequences to copy at a time."""
    return max(1, _GATHERED_BYTES // max(1, row_bytes * longest))


def _attend_own(
    q: Tensor, pages: Pages, rows: range, first_page: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each row over its own pages from `first_page` on: [g, K, G, E], [g, K, G]."""
    skipped = first_page * pages.block_size
    counts = [pages.lengths[row] - skipped for row in rows]
    starts = [pages.run(row, first_page) for row in rows]
    results = []
    # A row whose pages are scattered is a part by itself, at no slot of its own.
    firsts = [start if start is not None else -1 - row for row, start in enumerate(starts)]
    for part in evenly_spaced(firsts, counts):
        first = starts[part.start]
        if first is not None and all(starts[row] is not None for row in part):
            step = firsts[part.start + 1] - firsts[part.start] if len(part) > 1 else 0
            keys, values = pages.strided(first, step, len(part), counts[part.start])
            queries = q[part.start : part.stop]
            results.append(_attend_with_lse(queries, keys, values, scale))
            continue
        for row in part:
            keys, values = pages.gathered(rows[row], first_page)
            results.append(_attend_with_lse(q[row : row + 1], keys, values, scale))
    if len(results) == 1:
        return results[0]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


def _attend_with_lse(
    q: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """SDPA that also gives the log-sum-exp of the scores, [B, heads, queries] in fp32."""
    dtype = q.dtype
    if _is_faster_in_fp32(q):
        q, keys, values = q.float(), keys.float(), values.float()
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, scale=scale
    )
    return out.to(dtype), lse


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    dtype = q.dtype
    if _is_faster_in_fp32(q):
        q, keys, values = q.float(), keys.float(), values.float()
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale).to(dtype)


def _is_faster_in_fp32(q: Tensor) -> bool:
    """One query row a head in 16 bits is 2 to 4 times slower on the CPU than the same cast up."""
    return q.shape[2] == 1 and q.dtype != torch.float32 and q.device.type == "cpu"


def _attend_copies(
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
    return _attend(grouped, keys.transpose(1, 2), values.transpose(1, 2), scale, mask)


def _slots(cache: Tensor, pages: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Slots [B, num_pages * S, K, E] of the pages [B, num_pages], copied."""
    return cache.index_select(0, pages.flatten()).view(shape)
