"""The packed tensors of one step, from the scheduler's plan."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass

import torch

from tritonhybrid.long_rope import LongRope
from tritonhybrid.scheduler import PrefillGroup
from tritonhybrid.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Batch:
    """T packed tokens of B sequences.

    Args:
        input_ids: [T] int64.
        positions: [T] int64, each token's index in its own sequence.
        rope_rows: [T] int64, each token's row in the rope table: the positions themselves,
            unless longrope has two tables.
        slot_mapping: [T] int64, where its key and value go (page * S + offset).
        block_table: [B, MB] int32, pages of each sequence; the tail is arbitrary.
        cu_seqlens_q: [B + 1] int32, where each sequence's tokens begin.
        context_lens: [B] int32, keys each sequence sees, this step's included.
        is_decode: One token a sequence.
        max_seqlen_q: Longest run of tokens of one sequence.
        last_rows: [B] int64, each sequence's last token; None when is_decode.
        next_positions: [B] int64, index of the token that is to be sampled.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    rope_rows: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    is_decode: bool
    max_seqlen_q: int
    last_rows: torch.Tensor | None
    next_positions: torch.Tensor


def prefill_batch(
    groups: Sized[PrefillGroup],
    block_size: int,
    device: torch.device,
    long_rope: LongRope | None = None,
) -> Batch:
    """Pack the whole history of each group's leader."""
    leaders = [group.leader for group in groups]
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    bounds = [0]
    for leader in leaders:
        tokens = leader.tokens
        ids += tokens
        positions += range(len(tokens))
        slots += _slots(leader.block_table, len(tokens), block_size)
        bounds.append(len(ids))
    width = max(len(leader.block_table) for leader in leaders)
    tables = [leader.block_table + [0] * (width - len(leader.block_table)) for leader in leaders]
    lengths = [len(leader) for leader in leaders]
    position_ids = torch.tensor(positions, device=device)
    rope_rows = position_ids
    if long_rope is not None:
        rows = [long_rope.row(leader, p) for leader in leaders for p in range(len(leader))]
        rope_rows = torch.tensor(rows, device=device)
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        positions=position_ids,
        rope_rows=rope_rows,
        slot_mapping=torch.tensor(slots, device=device),
        block_table=torch.tensor(tables, dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32, device=device),
        context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        is_decode=False,
        max_seqlen_q=max(lengths),
        last_rows=torch.tensor([bound - 1 for bound in bounds[1:]], device=device),
        next_positions=torch.tensor(lengths, device=device),
    )


def _slots(table: list[int], length: int, block_size: int) -> list[int]:
    slots: list[int] = []
    for block in table:
        slots += range(block * block_size, (block + 1) * block_size)
    return slots[:length]


class DecodeBuffers:
    """The inputs of decode steps at fixed addresses, filled in place each step.

    Args:
        max_num_seqs: Most rows.
        max_blocks: Most pages a sequence can have.
        block_size: Tokens a page holds.
        device: Where the model computes.
        long_rope: The rule of a model with two rope tables.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        long_rope: LongRope | None = None,
    ) -> None:
        self.block_size = block_size
        self._long_rope = long_rope
        # All 64-bit inputs are rows of one tensor: one upload a step.
        num_inputs = 4 if long_rope is None else 5
        self._token_inputs = torch.zeros(num_inputs, max_num_seqs, dtype=torch.int64, device=device)
        self._context_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._cu_seqlens = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._tables: list[list[int]] = [[] for _ in range(max_num_seqs)]

    def fill(self, sequences: Sized[Sequence]) -> Batch:
        """Write one step's inputs; the views stay valid until the next call."""
        size = self.block_size
        count = len(sequences)
        positions = [len(sequence) - 1 for sequence in sequences]
        inputs = [
            [sequence.last_token for sequence in sequences],
            positions,
            [
                sequence.block_table[position // size] * size + position % size
                for sequence, position in zip(sequences, positions, strict=True)
            ],
            [position + 1 for position in positions],
        ]
        if self._long_rope is not None:
            pairs = zip(sequences, positions, strict=True)
            inputs.append([self._long_rope.row(sequence, position) for sequence, position in pairs])
        self._token_inputs[:, :count] = torch.tensor(inputs)
        self._context_lens[:count] = torch.tensor(inputs[3], dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            table = sequence.block_table
            if self._tables[row] != table:
                self._tables[row] = list(table)
                self._block_table[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        return Batch(
            input_ids=self._token_inputs[0, :count],
            positions=self._token_inputs[1, :count],
            rope_rows=self._token_inputs[1 if self._long_rope is None else 4, :count],
            slot_mapping=self._token_inputs[2, :count],
            block_table=self._block_table[:count],
            cu_seqlens_q=self._cu_seqlens[: count + 1],
            context_lens=self._context_lens[:count],
            is_decode=True,
            max_seqlen_q=1,
            last_rows=None,
            next_positions=self._token_inputs[3, :count],
        )
