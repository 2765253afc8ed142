"""Which tokens a sequence holds and how often, on the device, for penalties on them."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass, field

import torch

from tritonhybrid.sequence import Sequence


@dataclass
class _Row:
    """The host's side of one row: where each token stands and how much has been uploaded."""

    index: int
    columns: dict[int, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    num_counted: int = 0


class SeenTokens:
    """One row a sequence: its distinct tokens and how often its output holds each.

    A row stays where it is while its sequence lives, so that a step uploads only the
    newest tokens, whichever sequences have come and gone.

    Args:
        device: Where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: dict[Sequence, _Row] = {}
        self._free: list[int] = []
        # [rows, columns]: columns past a row's last token repeat its first.
        self._ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._counts = torch.zeros(0, 0, dtype=torch.float32, device=device)
        self._num_used = torch.zeros(0, dtype=torch.int64, device=device)
        self._current: list[Sequence] = []
        self._index = torch.zeros(0, dtype=torch.int64, device=device)
        self._width = 0

    def prepare(self, sequences: Sized[Sequence]) -> None:
        """Upload what the sequences have sampled since the last call."""
        if self._current != list(sequences):
            self._take_in(sequences)
        updates: list[tuple[int, int, int, int, int]] = []
        for sequence in sequences:
            row = self._rows[sequence]
            output = sequence.output
            for token in output[row.num_counted :]:
                column = row.columns.setdefault(token, len(row.counts))
                if column == len(row.counts):
                    row.counts.append(0)
                row.counts[column] += 1
                updates.append((row.index, column, token, row.counts[column], len(row.counts)))
            row.num_counted = len(output)
        self._width = max((len(self._rows[s].counts) for s in sequences), default=0)
        if not updates:
            return
        self._reserve(self._ids.shape[0], self._width)
        if len(updates) > len(sequences):
            # Several tokens of one sequence: the last update of a place is the one that counts.
            updates = list({(update[0], update[1]): update for update in updates}.values())
        rows, columns, tokens, counts, num_used = torch.tensor(updates, device=self._device).unbind(
            1
        )
        self._ids[rows, columns] = tokens
        self._counts[rows, columns] = counts.float()
        self._num_used.scatter_reduce_(0, rows, num_used, "amax")

    def penalise(
        self,
        logits: torch.Tensor,
        repetition: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
    ) -> None:
        """Penalise the tokens that the prepared sequences hold, in place.

        Args:
            logits: [R, V] float32, a row a prepared sequence.
            repetition: [R, 1] HF's, on tokens of prompt and output.
            presence: [R, 1] vLLM's, on tokens of the output.
            frequency: [R, 1] the same, times the token's count.
        """
        ids = self._ids[self._index, : self._width]
        counts = self._counts[self._index, : self._width]
        scores = logits.gather(1, ids)
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        scores -= frequency * counts
        scores -= presence * (counts > 0)
        is_used = torch.arange(self._width, device=ids.device) < self._num_used[self._index, None]
        # What a row repeats is written with the value of its first token, or writes would race.
        logits.scatter_(1, ids, torch.where(is_used, scores, scores[:, :1]))

    def _take_in(self, sequences: Sized[Sequence]) -> None:
        """Give new sequences their rows, of those that have ended first."""
        for sequence in [s for s in self._rows if s.is_finished]:
            self._free.append(self._rows.pop(sequence).index)
        new = [sequence for sequence in sequences if sequence not in self._rows]
        histories = [list(dict.fromkeys(sequence.prompt)) for sequence in new]
        num_rows = len(self._rows) + len(self._free)
        missing = len(new) - len(self._free)
        if missing > 0:
            self._free += range(num_rows + missing - 1, num_rows - 1, -1)
            num_rows += missing
        self._reserve(num_rows, max(map(len, histories), default=0))
        for sequence, tokens in zip(new, histories, strict=True):
            index = self._free.pop()
            columns = {token: column for column, token in enumerate(tokens)}
            self._rows[sequence] = _Row(index, columns, [0] * len(tokens))
            self._ids[index] = tokens[0]
            self._ids[index, : len(tokens)] = torch.tensor(tokens)
            self._counts[index] = 0
            self._num_used[index] = len(tokens)
        self._current = list(sequences)
        self._index = torch.tensor([self._rows[s].index for s in sequences], device=self._device)

    def _reserve(self, num_rows: int, width: int) -> None:
        """Grow to so many rows and columns, to twice as many at least where one is short."""
        have_rows, have_width = self._ids.shape
        if num_rows <= have_rows and width <= have_width:
            return
        if num_rows > have_rows:
            num_rows = max(num_rows, 2 * have_rows)
        if width > have_width:
            width = max(width, 2 * have_width)
        shape = (max(num_rows, have_rows), max(width, have_width))
        ids = torch.zeros(shape, dtype=torch.int64, device=self._device)
        counts = torch.zeros(shape, dtype=torch.float32, device=self._device)
        num_used = torch.zeros(shape[0], dtype=torch.int64, device=self._device)
        if have_rows and have_width:
            ids[:have_rows] = self._ids[:, :1]
            ids[:have_rows, :have_width] = self._ids
            counts[:have_rows, :have_width] = self._counts
            num_used[:have_rows] = self._num_used
        self._ids, self._counts, self._num_used = ids, counts, num_used
