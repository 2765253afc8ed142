"""What parameters do to logits: Hugging Face's processors in Hugging Face's order."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Sized
from dataclasses import dataclass

import torch

from tritonhybrid.sampling_params import SamplingParams, listed
from tritonhybrid.seen_tokens import SeenTokens
from tritonhybrid.sequence import Sequence

_MASKED = -math.inf

# (row, tokens of that row)
_Entries = list[tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class _Constraints:
    """What one SamplingParams says of single tokens, ready for any row.

    Args:
        biased: [M] tokens of logit_bias.
        bias: [M] float32.
        banned: [M] bad words of one token.
        suppressed: [M] suppress_tokens.
        words: Longer bad words, by the last token before the forbidden one: what
            precedes it, and the forbidden one.
    """

    biased: torch.Tensor
    bias: torch.Tensor
    banned: torch.Tensor
    suppressed: torch.Tensor
    words: dict[int, list[tuple[tuple[int, ...], int]]]


class _Places:
    """Single tokens of single rows, on the device; uploaded again only where they changed."""

    def __init__(self, device: torch.device) -> None:
        self._entries: _Entries = []
        self._device = device
        self.rows = torch.zeros(0, dtype=torch.int64, device=device)
        self.tokens = self.rows

    def set(self, entries: _Entries) -> None:
        """Take the place of what was there."""
        if entries == self._entries:
            return
        self._entries = entries
        rows = [row for row, tokens in entries for _ in tokens]
        tokens = [token for _, tokens in entries for token in tokens]
        self.rows, self.tokens = torch.tensor([rows, tokens], device=self._device).long()

    def fill(self, z: torch.Tensor, value: float) -> None:
        if self.rows.numel():
            z[self.rows, self.tokens] = value


class LogitRules:
    """Processes rows of logits by their sequences' parameters.

    What depends on the rows alone is uploaded when the rows change, what depends on the
    position only where it changes; the logits are then processed without a host read.

    Args:
        device: Where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[Sequence] = []
        self._seen = SeenTokens(device)
        self._constraints: dict[tuple[int, frozenset[int]], _Constraints] = {}
        # Keeps the ids above unique.
        self._known: list[SamplingParams] = []
        self._banned_now = _Places(device)
        self._suppressed_now = _Places(device)
        self._forced_now = _Places(device)

    def prepare(self, sequences: Sized[Sequence]) -> None:
        """Bring everything that the next :meth:`apply` needs to the device."""
        if self._rows != list(sequences):
            self._take_in(list(sequences))
        self._seen.prepare(self._penalised)
        banned: _Entries = []
        suppressed: _Entries = []
        forced: _Entries = []
        for row in self._timed:
            sequence = self._rows[row]
            params = sequence.params
            num_done = len(sequence.output)
            if num_done < params.min_new_tokens:
                banned.append((row, tuple(sequence.end_ids)))
            words = self._of_row[row].words
            if sequence.last_token in words:
                ended = words[sequence.last_token]
                banned.append((row, tuple(t for p, t in ended if _ends_with(sequence, p))))
            bos = params.forced_bos_token_id
            eos = listed(params.forced_eos_token_id)
            if eos and num_done == params.max_new_tokens - 1:
                forced.append((row, tuple(eos)))
            elif bos is not None and len(sequence) == 1:
                forced.append((row, (bos,)))
            first = 1 if bos is not None and len(sequence.prompt) == 1 else 0
            if num_done == first and params.begin_suppress_tokens:
                suppressed.append((row, tuple(params.begin_suppress_tokens)))
        self._banned_now.set(banned)
        self._suppressed_now.set(suppressed)
        self._forced_now.set(forced)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Process the logits of the prepared sequences.

        Args:
            logits: [B, V] float32; not changed.

        Returns:
            [B, V] with masked tokens at -inf.
        """
        z = logits.clone()
        if self._bias.numel():
            at = self._biased
            z[at] = z[at] + self._bias
        if self._penalised:
            _on_rows(z, self._penalties.rows, self._penalise)
        _fill(z, self._banned)
        self._banned_now.fill(z, _MASKED)
        if self._forced_now.rows.numel():
            z[self._forced_now.rows] = _MASKED
            self._forced_now.fill(z, 0.0)
        _fill(z, self._suppressed)
        self._suppressed_now.fill(z, _MASKED)
        if self._temperature is not None:
            z /= self._temperature
        for rows, values, keep in self._filters:
            _on_rows(z, rows, keep, values)
        return z

    def _take_in(self, sequences: list[Sequence]) -> None:
        self._rows = sequences
        params = [s.params for s in sequences]
        self._of_row = [self._constraints_of(s) for s in sequences]
        self._biased = self._indices([c.biased for c in self._of_row])
        self._bias = torch.cat([c.bias for c in self._of_row])
        self._banned = self._indices([c.banned for c in self._of_row])
        self._suppressed = self._indices([c.suppressed for c in self._of_row])
        self._timed = [
            row
            for row, (p, c) in enumerate(zip(params, self._of_row, strict=True))
            if c.words
            or p.min_new_tokens
            or p.begin_suppress_tokens
            or p.forced_bos_token_id is not None
            or listed(p.forced_eos_token_id)
        ]
        penalised = [row for row, p in enumerate(params) if p.has_penalties]
        self._penalised = [sequences[row] for row in penalised]
        self._penalties = _Penalties(
            self._row_index(penalised),
            *(
                self._column([getattr(params[row], f"{name}_penalty") for row in penalised])
                for name in ("repetition", "presence", "frequency")
            ),
        )
        # A greedy row is neither divided nor filtered: its log-probabilities are at temperature 1.
        temperatures = [1.0 if p.is_greedy else float(p.temperature) for p in params]
        scales = any(temperature != 1 for temperature in temperatures)
        self._temperature = self._column(temperatures) if scales else None
        drawn = [(row, p) for row, p in enumerate(params) if not p.is_greedy]
        self._filters: list[tuple[torch.Tensor | None, torch.Tensor, Callable[..., None]]] = []
        top_k = [(row, float(p.top_k)) for row, p in drawn if p.top_k]
        # 1 - p in double precision, as HF has it: 1 - 0.9 in fp32 is the next number up.
        top_p = [(row, 1 - p.top_p) for row, p in drawn if p.top_p < 1]
        min_p = [(row, float(p.min_p)) for row, p in drawn if p.min_p > 0]
        most = [int(k) for _, k in top_k]
        for chosen, keep in (
            (top_k, lambda z, ks: _keep_top_k(z, ks, most)),
            (top_p, keep_top_p),
            (min_p, keep_min_p),
        ):
            if chosen:
                rows, values = zip(*chosen, strict=True)
                self._filters.append((self._row_index(list(rows)), self._column(values), keep))

    def _constraints_of(self, sequence: Sequence) -> _Constraints:
        params = sequence.params
        key = (id(params), sequence.end_ids)
        found = self._constraints.get(key)
        if found is None:
            words = [tuple(word) for word in params.bad_words_ids]
            singles = {word[0] for word in words if len(word) == 1} - sequence.end_ids
            longer: dict[int, list[tuple[tuple[int, ...], int]]] = {}
            for word in words:
                if len(word) > 1:
                    longer.setdefault(word[-2], []).append((word[:-1], word[-1]))
            bias = params.logit_bias or {}
            found = _Constraints(
                biased=self._ids(list(bias)),
                bias=torch.tensor(list(bias.values()), dtype=torch.float32, device=self._device),
                banned=self._ids(sorted(singles)),
                suppressed=self._ids(sorted(set(params.suppress_tokens))),
                words=longer,
            )
            self._constraints[key] = found
            self._known.append(params)
        return found

    def _ids(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    def _indices(self, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = self._ids([len(ids) for ids in tokens])
        rows = torch.arange(len(tokens), device=self._device)
        return rows.repeat_interleave(lengths), torch.cat(tokens)

    def _row_index(self, rows: list[int]) -> torch.Tensor | None:
        """Where the rows are; None where they are all."""
        return None if len(rows) == len(self._rows) else self._ids(rows)

    def _column(self, values: Sized[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device).unsqueeze(1)

    def _penalise(self, z: torch.Tensor) -> None:
        penalties = self._penalties
        self._seen.penalise(z, penalties.repetition, penalties.presence, penalties.frequency)


@dataclass(frozen=True)
class _Penalties:
    """[R, 1] each, of the rows that have any."""

    rows: torch.Tensor | None
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


def _on_rows(
    z: torch.Tensor,
    rows: torch.Tensor | None,
    change: Callable[..., None],
    *arguments: torch.Tensor,
) -> None:
    """Change some rows in place, or all without a copy."""
    if rows is None:
        change(z, *arguments)
        return
    part = z[rows]
    change(part, *arguments)
    z[rows] = part


def _fill(z: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor]) -> None:
    if places[0].numel():
        z[places] = _MASKED


def _ends_with(sequence: Sequence, tokens: tuple[int, ...]) -> bool:
    """Whether prompt and output end with these tokens."""
    num_own = len(tokens) - len(sequence.output)
    if num_own <= 0:
        return tuple(sequence.output[-len(tokens) :]) == tokens
    if num_own > len(sequence.prompt):
        return False
    return (*sequence.prompt[-num_own:], *sequence.output) == tokens


def _keep_top_k(z: torch.Tensor, ks: torch.Tensor, counts: list[int]) -> None:
    """Mask what is below the k-th best of its row; ties stay."""
    size = z.shape[1]
    most = max((k for k in counts if k < size), default=0)
    if not most:
        return
    keep_top_k(z, ks, most)


def keep_top_k(z: torch.Tensor, ks: torch.Tensor, num_candidates: int) -> None:
    """Mask in place what is below the k-th best of its row; ties stay.

    Args:
        z: [R, V] logits.
        ks: [R, 1] each row's k, at least 1; V or more keeps all.
        num_candidates: At least the largest k below V.
    """
    best = z.topk(num_candidates, dim=1).values
    kth = best.gather(1, ks.clamp(max=num_candidates).long() - 1)
    z.masked_fill_((z < kth) & (ks < z.shape[1]), _MASKED)


def keep_top_p(z: torch.Tensor, rest: torch.Tensor) -> None:
    """Mask the least likely tokens whose mass together is at most ``rest`` [R, 1], 1 - p."""
    ascending, order = z.sort(dim=1)
    out = ascending.softmax(1).cumsum(1) <= rest
    out[:, -1].fill_(False)
    z.masked_fill_(torch.zeros_like(out).scatter(1, order, out), _MASKED)


def keep_min_p(z: torch.Tensor, shares: torch.Tensor) -> None:
    """Mask what has less than its share of the likeliest token's probability."""
    probabilities = z.softmax(1)
    z.masked_fill_(probabilities < shares * probabilities.amax(1, keepdim=True), _MASKED)
