"""From hidden states to tokens and their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Sized
from dataclasses import dataclass

import torch

from tritonhybrid.errors import NonFiniteLogitsError
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.sequence import Sequence
from tritonhybrid_kernels.ops import Ops

_MASKED = -math.inf


@dataclass(frozen=True)
class HeadCalls:
    """What the sampler needs of the model's head.

    Args:
        logits: [B, D] hidden states to [B, V] float32 logits.
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
    """One token a row, on the host."""

    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]


@dataclass(frozen=True)
class Drawn:
    """One token a row, still on the device: [B] int64 and twice [B] float32."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    raw_logprobs: torch.Tensor


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
        """Upload the per-row settings, only when the rows changed."""
        if len(self._rows) == len(sequences) and all(
            a is b for a, b in zip(self._rows, sequences, strict=True)
        ):
            return
        count = len(sequences)
        if count > self._keys.shape[0]:
            self._reserve(count)
        self._rows = list(sequences)
        params = [s.params for s in sequences]
        self._keys[:count] = torch.tensor([s.key for s in sequences])
        self._uids[:count] = torch.tensor([s.uid for s in sequences])
        self._greedy[:count] = torch.tensor([p.is_greedy for p in params])
        self._temperature[:count] = torch.tensor([float(p.temperature) for p in params])
        self.used |= {"argmax"} if any(p.is_greedy for p in params) else set()
        fuses = self._ops.backend == "triton" and self._head.weight is not None
        self._fused = [i for i, p in enumerate(params) if fuses and not p.has_filters]
        fused = set(self._fused)
        self._processed = [i for i in range(count) if i not in fused]
        if any(not params[i].is_greedy for i in self._fused):
            self.used.add("gumbel_max")
        if any(not params[i].is_greedy for i in self._processed):
            self.used.add("inverse_cdf")

    def draw(
        self, hidden: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None
    ) -> Drawn:
        """Draw on the device; when every row takes the fused path nothing looks at the host.

        Args:
            hidden: [B', D] last hidden states.
            positions: [B] int64, index of the token to be drawn.
            rows: [B] int64, the hidden row of each sequence; None when B' = B.
        """
        if not self._processed:
            return self._draw_fused(hidden if rows is None else hidden[rows], positions, None)
        if not self._fused:
            return self._draw_processed(hidden, positions, rows, None)
        if rows is None:
            rows = torch.arange(len(self._rows), device=self._device)
        tokens = torch.empty(len(self._rows), dtype=torch.int64, device=self._device)
        logprobs = torch.empty(len(self._rows), dtype=torch.float32, device=self._device)
        raw = torch.empty_like(logprobs)
        fused = torch.tensor(self._fused, device=self._device)
        processed = torch.tensor(self._processed, device=self._device)
        for index, part in (
            (fused, self._draw_fused(hidden[rows[fused]], positions[fused], fused)),
            (
                processed,
                self._draw_processed(hidden, positions[processed], rows[processed], processed),
            ),
        ):
            tokens[index], logprobs[index], raw[index] = (
                part.tokens,
                part.logprobs,
                part.raw_logprobs,
            )
        return Drawn(tokens, logprobs, raw)

    def collect(self, drawn: Drawn, sequences: Sized[Sequence]) -> Sampled:
        """Read what was drawn: the one host read of a step.

        Raises:
            NonFiniteLogitsError: A row's logits are not finite or all masked.
        """
        sampled = Sampled(
            drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.raw_logprobs.tolist()
        )
        for row, sequence in enumerate(sequences):
            values = (sampled.logprobs[row], sampled.raw_logprobs[row])
            if not all(math.isfinite(value) for value in values):
                raise NonFiniteLogitsError(
                    sequence.prompt_index, len(sequence), f"log-probabilities {values}"
                )
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
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor | None,
        index: torch.Tensor | None,
    ) -> Drawn:
        keys, uids, greedy, _ = self._settings(index)
        logits = self._head.logits(hidden)
        if rows is not None:
            logits = logits[rows]
        processed = process_logits(logits, [self._rows[i] for i in self._processed])
        tokens, logprobs = self._ops.sample_logits(processed, keys, uids, positions, greedy)
        if processed is logits:
            return Drawn(tokens, logprobs, logprobs)
        raw = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
        # Greedy log-probabilities are the raw ones, also where a penalty chose the token.
        return Drawn(tokens, torch.where(greedy, raw, logprobs), raw)


def process_logits(logits: torch.Tensor, sequences: Sized[Sequence]) -> torch.Tensor:
    """Penalties, temperature, top-k, top-p, min-p: HF's processors in HF's order.

    Args:
        logits: [B, V] float32; not changed.
        sequences: One a row.

    Returns:
        [B, V] with masked tokens at -inf; ``logits`` itself where nothing applies.
    """
    params = [s.params for s in sequences]
    scales = any(p.temperature not in (0, 1) for p in params)
    if not scales and not any(p.has_filters for p in params):
        return logits
    z = logits.clone()
    for row, sequence in enumerate(sequences):
        if sequence.params.repetition_penalty != 1:
            _penalise(z[row], sequence)
        if len(sequence.output) < sequence.params.min_new_tokens and sequence.end_ids:
            z[row, sorted(sequence.end_ids)] = _MASKED
    # A greedy row is neither divided nor filtered: its log-probabilities are at temperature 1.
    drawn = [SamplingParams() if p.is_greedy else p for p in params]
    if scales:
        z /= _column([p.temperature for p in drawn], z.device)
    if any(p.top_k for p in drawn):
        _keep_top_k(z, [p.top_k for p in drawn])
    if any(p.top_p < 1 for p in drawn):
        # 1 - p in double precision, as HF has it: 1 - 0.9 in fp32 is the next number up.
        _keep_top_p(z, _column([1 - p.top_p for p in drawn], z.device))
    if any(p.min_p > 0 for p in drawn):
        probabilities = z.softmax(1)
        least = _column([p.min_p for p in drawn], z.device) * probabilities.amax(1, keepdim=True)
        z.masked_fill_(probabilities < least, _MASKED)
    return z


def _keep_top_k(z: torch.Tensor, top_k: list[int]) -> None:
    """Mask what is below the k-th best of its row; ties stay. 0 keeps all, as in HF."""
    size = z.shape[1]
    ks = [min(k, size) or size for k in top_k]
    most = max((k for k in ks if k < size), default=size)
    best = z.topk(most, dim=1).values
    kth = best.gather(1, torch.tensor([min(k, most) - 1 for k in ks], device=z.device)[:, None])
    filtered = torch.tensor([k < size for k in ks], device=z.device)[:, None]
    z.masked_fill_((z < kth) & filtered, _MASKED)


def _keep_top_p(z: torch.Tensor, rest: torch.Tensor) -> None:
    """Mask the least likely tokens whose mass together is at most ``rest``, 1 - p."""
    ascending, order = z.sort(dim=1)
    out = ascending.softmax(1).cumsum(1) <= rest
    out[:, -1] = False
    # A row without top-p keeps even what rounds to probability 0.
    out &= rest > 0
    z.masked_fill_(torch.zeros_like(out).scatter(1, order, out), _MASKED)


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    seen = torch.tensor(sorted(set(sequence.prompt) | set(sequence.output)), device=row.device)
    scores = row[seen]
    penalty = sequence.params.repetition_penalty
    row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _column(values: Sized[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)
