"""The packed tensors of one step, from the scheduler's plan."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass

import torch

from tritonhybrid.long_rope import LongRope
from tritonhybrid.scheduler import PrefillGroup
from tritonhybrid.sequence import Sequence
from tritonhybrid.token_ring import TokenRing
from tritonhybrid_kernels.ops import Ops


@dataclass(frozen=True, kw_only=True)
class Batch:
    """T packed tokens of B sequences: one of each that decodes, then chunks of prompts.

    Args:
        input_ids: [T] int64.
        positions: [T] int64, each token's index in its own sequence.
        rope_rows: [T] int64, each token's row in the rope table: the positions themselves,
            unless longrope has two tables.
        slot_mapping: [T] int64, where its key and value go (page * S + offset).
        block_table: [B, MB] int32, pages of each sequence; the tail is arbitrary.
        context_lens: [B] int32, keys each sequence sees, this step's included.
        num_decodes: Sequences that come first, with one token each.
        cu_seqlens_q: [B - num_decodes + 1] int32, where each chunk's tokens begin, counted
            from the first chunk; None without chunks.
        max_seqlen_q: Longest chunk, or 1.
        last_rows: [B'] int64, the last token of each sequence that samples one; None where
            each token is its sequence's last.
        next_positions: [B'] int64, index of the token that is to be sampled.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    rope_rows: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    context_lens: torch.Tensor
    num_decodes: int
    cu_seqlens_q: torch.Tensor | None
    max_seqlen_q: int
    last_rows: torch.Tensor | None
    next_positions: torch.Tensor

    @property
    def is_decode(self) -> bool:
        """Whether there is no chunk among its tokens."""
        return self.cu_seqlens_q is None


def prefill_batch(
    groups: Sized[PrefillGroup],
    block_size: int,
    device: torch.device,
    long_rope: LongRope | None = None,
    decode: Sized[Sequence] = (),
) -> Batch:
    """Pack the chunks of the groups' leaders behind one token of each decoding sequence.

    Args:
        groups: At least one.
        block_size: Tokens a page holds.
        device: Where the model computes.
        long_rope: The rule of a model with two rope tables.
        decode: Sequences that decode in the same step.
    """
    spans = [(sequence, len(sequence) - 1, len(sequence)) for sequence in decode]
    spans += [(group.leader, group.start, group.end) for group in groups]
    ids: list[int] = []
    positions: list[int] = []
    rope_rows: list[int] = []
    slots: list[int] = []
    ends: list[int] = []
    for sequence, start, stop in spans:
        ids += sequence.tokens[start:stop] if stop - start > 1 else [sequence.token(start)]
        positions += range(start, stop)
        slots += _slots(sequence.block_table, start, stop, block_size)
        if long_rope is not None:
            rope_rows += [long_rope.row(sequence, position) for position in range(start, stop)]
        ends.append(len(ids))
    width = max(len(sequence.block_table) for sequence, _, _ in spans)
    tables = [s.block_table + [0] * (width - len(s.block_table)) for s, _, _ in spans]
    count = len(decode)
    samples = [*range(count), *(count + i for i, g in enumerate(groups) if g.is_complete)]
    position_ids = torch.tensor(positions, device=device)
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        positions=position_ids,
        rope_rows=position_ids if long_rope is None else torch.tensor(rope_rows, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        block_table=torch.tensor(tables, dtype=torch.int32, device=device),
        context_lens=torch.tensor([s[2] for s in spans], dtype=torch.int32, device=device),
        num_decodes=count,
        cu_seqlens_q=torch.tensor(
            [end - count for end in [count, *ends[count:]]], dtype=torch.int32, device=device
        ),
        max_seqlen_q=max(group.num_tokens for group in groups),
        last_rows=torch.tensor([ends[i] - 1 for i in samples], dtype=torch.int64, device=device),
        next_positions=torch.tensor(
            [spans[i][2] for i in samples], dtype=torch.int64, device=device
        ),
    )


def _slots(table: list[int], start: int, stop: int, block_size: int) -> list[int]:
    """Slots of positions ``start`` to ``stop``."""
    first = start // block_size
    slots: list[int] = []
    for block in table[first : -(-stop // block_size)]:
        slots += range(block * block_size, (block + 1) * block_size)
    return slots[start - first * block_size : stop - first * block_size]


class DecodeBuffers:
    """The inputs of decode steps at fixed addresses, filled in place each step.

    Args:
        max_num_seqs: Most rows.
        max_blocks: Most pages a sequence can have.
        block_size: Tokens a page holds.
        device: Where the model computes.
        long_rope: The rule of a model with two rope tables.
        max_steps: Most steps that follow one another on the device.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        long_rope: LongRope | None = None,
        max_steps: int = 1,
    ) -> None:
        self.block_size = block_size
        self._long_rope = long_rope
        # All 64-bit inputs are rows of one tensor: one upload a step.
        num_inputs = 6 if long_rope is None else 7
        self._token_inputs = torch.zeros(num_inputs, max_num_seqs, dtype=torch.int64, device=device)
        self._context_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._tables: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._ring = TokenRing(max_steps, max_num_seqs, device)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of all that decode steps read and write here, and the block table's row length."""
        tensors = (self._token_inputs, self._context_lens, self._block_table)
        return (*(t.data_ptr() for t in tensors), *self._block_table.shape, *self._ring.addresses)

    @property
    def max_steps(self) -> int:
        """Most steps that follow one another on the device."""
        return self._ring.max_steps

    def fits(
        self,
        num_seqs: int,
        max_blocks: int,
        block_size: int,
        long_rope: LongRope | None,
        max_steps: int,
    ) -> bool:
        """Whether it serves so many rows and pages a row, of pages and steps just like that."""
        rows, blocks = self._block_table.shape
        return (
            rows >= num_seqs
            and blocks >= max_blocks
            and (self.block_size, self._long_rope) == (block_size, long_rope)
            and self.max_steps == max_steps
        )

    def fill(
        self, sequences: Sized[Sequence], num_rows: int | None = None, num_steps: int = 1
    ) -> Batch:
        """Write the inputs of a step; the views stay valid until the next call.

        Args:
            sequences: One a row; their tables hold pages for ``num_steps`` tokens, or for as
                many as each may still sample.
            num_rows: Rows of the step; those past the sequences are padding: no slot, no keys.
            num_steps: Steps that will follow one another.
        """
        size = self.block_size
        padding = (num_rows or len(sequences)) - len(sequences)
        count = len(sequences) + padding
        positions = [len(sequence) - 1 for sequence in sequences]
        pairs = list(zip(sequences, positions, strict=True))
        inputs = [
            [sequence.last_token for sequence in sequences],
            positions,
            [s.block_table[p // size] * size + p % size for s, p in pairs],
            [position + 1 for position in positions],
            [0] * len(sequences),
            [p - 1 + min(num_steps, s.num_left) for s, p in pairs],
        ]
        if self._long_rope is not None:
            inputs.append([self._long_rope.row(sequence, position) for sequence, position in pairs])
        if padding:
            inputs = [row + padding * [-1 if i == 2 else 0] for i, row in enumerate(inputs)]
        self._token_inputs[:, :count] = torch.tensor(inputs)
        self._context_lens[:count] = torch.tensor(inputs[3], dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            table = sequence.block_table
            if self._tables[row] != table:
                self._tables[row] = list(table)
                self._block_table[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        return self.batch(count)

    def batch(self, num_rows: int) -> Batch:
        """The inputs of the first rows, as they stand; nothing is written."""
        return Batch(
            input_ids=self._token_inputs[0, :num_rows],
            positions=self._token_inputs[1, :num_rows],
            rope_rows=self._token_inputs[1 if self._long_rope is None else 6, :num_rows],
            slot_mapping=self._token_inputs[2, :num_rows],
            block_table=self._block_table[:num_rows],
            context_lens=self._context_lens[:num_rows],
            num_decodes=num_rows,
            cu_seqlens_q=None,
            max_seqlen_q=1,
            last_rows=None,
            next_positions=self._token_inputs[3, :num_rows],
        )

    def advance(
        self,
        ops: Ops,
        batch: Batch,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        raw_logprobs: torch.Tensor,
    ) -> None:
        """Make a step's inputs its successor's, on the device, and keep what was sampled.

        Args:
            ops: The operations to call.
            batch: From :meth:`batch`.
            tokens: [R] int64, sampled by the step.
            logprobs: [R] float32.
            raw_logprobs: [R] float32.
        """
        num_rows = tokens.shape[0]
        rope = self._long_rope
        ops.decode_advance(
            tokens,
            logprobs,
            raw_logprobs,
            input_ids=batch.input_ids,
            positions=batch.positions,
            next_positions=batch.next_positions,
            slot_mapping=batch.slot_mapping,
            context_lens=batch.context_lens,
            steps=self._token_inputs[4, :num_rows],
            last_positions=self._token_inputs[5, :num_rows],
            block_table=batch.block_table,
            block_size=self.block_size,
            ring_tokens=self._ring.tokens[:, :num_rows],
            ring_logprobs=self._ring.logprobs[:, :num_rows],
            ring_raw_logprobs=self._ring.raw_logprobs[:, :num_rows],
            rope_rows=None if rope is None else batch.rope_rows,
            rope_original=0 if rope is None else rope.original,
        )

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the steps since the last fill sampled, on the host: three of [max_steps, rows]."""
        return self._ring.read()
