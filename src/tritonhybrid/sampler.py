"""From hidden states to tokens and their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Sized
from dataclasses import dataclass, replace

import torch

from tritonhybrid.errors import NonFiniteLogitsError
from tritonhybrid.logit_rules import LogitRules
from tritonhybrid.sequence import Sequence, TopLogprobs
from tritonhybrid_kernels.ops import Ops


@dataclass(frozen=True)
class HeadCalls:
    """What the sampler needs of the model's head.

    Args:
        logits: [B, D] hidden states to [B, V] float32 logits, which the sampler may
            overwrite.
        weight: [V, D] where the head is a plain linear layer, else None.
        bias: [V] or None.
        scale: Factor on the logits.
        softcap: Cap of the logits, or None.
    """

    logits: Callable[[torch.Tensor], torch.Tensor]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Sampled:
    """One token a row, on the host; the last two only for rows that ask for them."""

    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    top_logprobs: dict[int, TopLogprobs]
    entropies: dict[int, float]

    def row(self, index: int) -> tuple[int, float, float, TopLogprobs | None, float | None]:
        """What ``Sequence.append`` takes."""
        return (
            self.tokens[index],
            self.logprobs[index],
            self.raw_logprobs[index],
            self.top_logprobs.get(index),
            self.entropies.get(index),
        )


@dataclass(frozen=True)
class Report:
    """Facts of the raw distributions of R rows, best tokens first.

    Args:
        tokens: [R, K] int64.
        logprobs: [R, K] float32, of those tokens.
        entropies: [R] float32, nats.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor


@dataclass(frozen=True)
class Drawn:
    """One token a row, still on the device: [B] int64 and twice [B] float32."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    raw_logprobs: torch.Tensor
    report: Report | None = None


class Sampler:
    """Draws tokens with noise that depends on (key, uid, position, vocabulary) alone.

    Where logits exist: one uniform a token and the inverse CDF of the processed
    distribution in vocabulary order. On the Triton backend rows without filters:
    Gumbel-max inside the head's own kernel, no logits. Which of the two serves a
    sequence depends on its own parameters, never on its neighbours.

    Args:
        ops: The operations to call.
        head: The model's head.
        device: Where the model computes.
        capacity: Most rows; the per-row settings of up to so many keep their addresses.
    """

    def __init__(
        self, ops: Ops, head: HeadCalls, device: torch.device, *, capacity: int = 0
    ) -> None:
        self._ops = ops
        self._head = head
        self._device = device
        self._rows: list[Sequence] = []
        self._rules = LogitRules(device)
        self._reserve(capacity)
        self.used: set[str] = set()

    def sample(
        self, hidden: torch.Tensor, sequences: Sized[Sequence], rows: torch.Tensor | None = None
    ) -> Sampled:
        """Sample the next token of each sequence: prepare, draw, collect.

        Args:
            hidden: [B', D] last hidden states.
            sequences: B sequences; not changed.
            rows: [B] int64, the hidden row of each sequence; None when B' = B.

        Returns:
            The tokens with both log-probabilities.

        Raises:
            NonFiniteLogitsError: A row's logits are not finite or all masked.
        """
        self.prepare(sequences)
        positions = torch.tensor([len(s) for s in sequences], device=self._device)
        return self.collect(self.draw(hidden, positions, rows), sequences)

    def prepare(self, sequences: Sized[Sequence]) -> None:
        """Upload the per-row settings when the rows changed, and what their last tokens change."""
        if self._rows != list(sequences):
            self._take_in(list(sequences))
        if self._ruled:
            self._rules.prepare(self._ruled)

    def draw(
        self, hidden: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
    ) -> Drawn:
        """Draw on the device; nothing looks at the host.

        Args:
            hidden: [B', D] last hidden states.
            positions: [B] int64, index of the token to be drawn.
            rows: [B] int64, the hidden row of each sequence; None when B' = B.
        """
        fused, processed = self._fused, self._processed
        if not self._needs_logits:
            return self._draw_fused(hidden if rows is None else hidden[rows], positions, None)
        logits = self._head.logits(hidden)
        if rows is not None:
            logits = logits[rows]
        report = self._report(logits)
        if fused is None:
            drawn = self._draw_processed(logits, positions, None)
            return replace(drawn, report=report)
        if rows is not None:
            hidden = hidden[rows]
        if processed is None:
            return replace(self._draw_fused(hidden, positions, None), report=report)
        tokens = torch.empty(len(self._rows), dtype=torch.int64, device=self._device)
        logprobs = torch.empty(len(self._rows), dtype=torch.float32, device=self._device)
        raw = torch.empty_like(logprobs)
        for index, part in (
            (fused, self._draw_fused(hidden[fused], positions[fused], fused)),
            (
                processed,
                self._draw_processed(logits[processed], positions[processed], processed),
            ),
        ):
            tokens[index], logprobs[index], raw[index] = (
                part.tokens,
                part.logprobs,
                part.raw_logprobs,
            )
        return Drawn(tokens, logprobs, raw, report)

    def collect(self, drawn: Drawn, sequences: Sized[Sequence]) -> Sampled:
        """Read what was drawn: the one host read of a step.

        Raises:
            NonFiniteLogitsError: A row's logits are not finite or all masked.
        """
        top, entropies = self._collect_report(drawn.report)
        sampled = Sampled(
            drawn.tokens.tolist(),
            drawn.logprobs.tolist(),
            drawn.raw_logprobs.tolist(),
            top,
            entropies,
        )
        for row, sequence in enumerate(sequences):
            values = (sampled.logprobs[row], sampled.raw_logprobs[row])
            check_finite(sequence, len(sequence), values)
        return sampled

    def _reserve(self, capacity: int) -> None:
        self._keys = torch.zeros(capacity, dtype=torch.int64, device=self._device)
        self._uids = torch.zeros(capacity, dtype=torch.int64, device=self._device)
        self._greedy = torch.zeros(capacity, dtype=torch.bool, device=self._device)
        self._temperature = torch.zeros(capacity, dtype=torch.float32, device=self._device)

    def _settings(
        self, index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        columns = (self._keys, self._uids, self._greedy, self._temperature)
        if index is None:
            keys, uids, greedy, temperature = (c[: len(self._rows)] for c in columns)
        else:
            keys, uids, greedy, temperature = (c[index] for c in columns)
        return keys, uids, greedy, temperature

    def _draw_fused(
        self, hidden: torch.Tensor, positions: torch.Tensor, index: torch.Tensor | None
    ) -> Drawn:
        keys, uids, _, temperature = self._settings(index)
        return Drawn(
            *self._ops.lm_head_sample(
                hidden,
                self._head.weight,
                self._head.bias,
                temperature=temperature,
                keys=keys,
                uids=uids,
                positions=positions,
                logit_scale=self._head.scale,
                softcap=self._head.softcap,
            )
        )

    def _draw_processed(
        self, logits: torch.Tensor, positions: torch.Tensor, index: torch.Tensor | None
    ) -> Drawn:
        keys, uids, greedy, _ = self._settings(index)
        ruled = self._ruled_rows
        if not self._ruled:
            tokens, logprobs = self._ops.sample_logits(logits, keys, uids, positions, greedy)
            return Drawn(tokens, logprobs, logprobs)
        if ruled is None:
            plain, processed = logits, self._rules.apply(logits)
        else:
            # Rows without rules stay where they are.
            plain, processed = logits[ruled], logits
            processed[ruled] = self._rules.apply(plain)
        tokens, logprobs = self._ops.sample_logits(processed, keys, uids, positions, greedy)
        chosen = tokens if ruled is None else tokens[ruled]
        raw = plain.gather(1, chosen.unsqueeze(1)).squeeze(1) - plain.logsumexp(1)
        if ruled is not None:
            raw = logprobs.index_copy(0, ruled, raw)
        # Greedy log-probabilities are the raw ones, also where a penalty chose the token; NaN
        # stays: it says that every token is masked.
        return Drawn(tokens, torch.where(greedy & ~logprobs.isnan(), raw, logprobs), raw)

    def _take_in(self, sequences: list[Sequence]) -> None:
        count = len(sequences)
        if count > self._keys.shape[0]:
            self._reserve(count)
        self._rows = sequences
        params = [s.params for s in sequences]
        self._keys[:count] = torch.tensor([s.key for s in sequences])
        self._uids[:count] = torch.tensor([s.uid for s in sequences])
        self._greedy[:count] = torch.tensor([p.is_greedy for p in params])
        self._temperature[:count] = torch.tensor([float(p.temperature) for p in params])
        self.used |= {"argmax"} if any(p.is_greedy for p in params) else set()
        fuses = self._ops.backend == "triton" and self._head.weight is not None
        fused = [i for i, p in enumerate(params) if fuses and not p.has_filters]
        taken = set(fused)
        processed = [i for i in range(count) if i not in taken]
        if any(not params[i].is_greedy for i in fused):
            self.used.add("gumbel_max")
        if any(not params[i].is_greedy for i in processed):
            self.used.add("inverse_cdf")
        # Indices of rows; None where there are none.
        self._fused = self._index(fused) if fused else None
        self._processed = self._index(processed) if processed else None
        # Rows whose logits change, counted among the processed ones; None where they are all.
        ruled = [
            place
            for place, i in enumerate(processed)
            if params[i].has_filters or params[i].temperature not in (0, 1)
        ]
        self._ruled = [sequences[processed[place]] for place in ruled]
        self._ruled_rows = self._index(ruled) if len(ruled) < len(processed) else None
        self._reported = [i for i, p in enumerate(params) if p.entropy or p.top_logprobs]
        self._reported_rows = self._index(self._reported)
        self._num_top = max((p.top_logprobs for p in params), default=0)
        self._needs_logits = bool(processed or self._reported)

    def _index(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _report(self, logits: torch.Tensor) -> Report | None:
        if not self._reported:
            return None
        if len(self._reported) < len(self._rows):
            logits = logits[self._reported_rows]
        logprobs = logits.log_softmax(1)
        best = logprobs.topk(self._num_top, dim=1)
        entropies = torch.special.entr(logprobs.exp()).sum(1)
        return Report(best.indices, best.values, entropies)

    def _collect_report(
        self, report: Report | None
    ) -> tuple[dict[int, TopLogprobs], dict[int, float]]:
        top: dict[int, TopLogprobs] = {}
        entropies: dict[int, float] = {}
        if report is None:
            return top, entropies
        columns = (report.tokens.tolist(), report.logprobs.tolist(), report.entropies.tolist())
        for row, tokens, logprobs, entropy in zip(self._reported, *columns, strict=True):
            params = self._rows[row].params
            if params.top_logprobs:
                count = params.top_logprobs
                top[row] = list(zip(tokens[:count], logprobs[:count], strict=True))
            if params.entropy:
                entropies[row] = entropy
        return top, entropies


def check_finite(sequence: Sequence, position: int, logprobs: tuple[float, float]) -> None:
    """Refuse a token whose log-probabilities say that its logits were none.

    Args:
        sequence: Whose token it is.
        position: Of the token.
        logprobs: Both.

    Raises:
        NonFiniteLogitsError: One is not finite.
    """
    if not all(math.isfinite(value) for value in logprobs):
        raise NonFiniteLogitsError(sequence.prompt_index, position, f"log-probabilities {logprobs}")


def process_logits(logits: torch.Tensor, sequences: Sized[Sequence]) -> torch.Tensor:
    """Process logits as sampling does: HF's processors in HF's order.

    Args:
        logits: [B, V] float32; not changed.
        sequences: One a row.

    Returns:
        [B, V] with masked tokens at -inf; ``logits`` itself where nothing applies.
    """
    if all(not s.params.has_filters and s.params.temperature in (0, 1) for s in sequences):
        return logits
    rules = LogitRules(logits.device)
    rules.prepare(sequences)
    return rules.apply(logits)
