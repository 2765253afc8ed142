"""From hidden states to tokens and their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Sized
from dataclasses import dataclass
from typing import Any

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


class Sampler:
    """Draws tokens with noise that depends on (key, uid, position, vocabulary) alone.

    Where logits exist: one uniform a token and the inverse CDF of the processed
    distribution in vocabulary order. On the Triton backend without filters:
    Gumbel-max inside the head's own kernel, no logits.

    Args:
        ops: The operations to call.
        head: The model's head.
        device: Where the model computes.
    """

    def __init__(self, ops: Ops, head: HeadCalls, device: torch.device) -> None:
        self._ops = ops
        self._head = head
        self._device = device
        self._rows: list[Sequence] = []
        self.used: set[str] = set()

    def sample(
        self, hidden: torch.Tensor, sequences: Sized[Sequence], rows: torch.Tensor | None = None
    ) -> Sampled:
        """Sample the next token of each sequence.

        Args:
            hidden: [B', D] last hidden states.
            sequences: B sequences; not changed.
            rows: [B] int64, the hidden row of each sequence; None when B' = B.

        Returns:
            The tokens with both log-probabilities.

        Raises:
            NonFiniteLogitsError: A row's logits are not finite or all masked.
        """
        self._refresh(sequences)
        positions = torch.tensor([len(s) for s in sequences], device=self._device)
        if self._fuses_head:
            tokens, logprobs, raw = self._ops.lm_head_sample(
                hidden if rows is None else hidden[rows],
                self._head.weight,
                self._head.bias,
                temperature=self._temperature,
                keys=self._keys,
                uids=self._uids,
                positions=positions,
                logit_scale=self._head.scale,
                softcap=self._head.softcap,
            )
            self.used.add("gumbel_max")
        else:
            logits = self._head.logits(hidden)
            if rows is not None:
                logits = logits[rows]
            processed = self._process(logits, sequences)
            tokens, logprobs = self._ops.sample_logits(
                processed, self._keys, self._uids, positions, self._greedy
            )
            raw = logprobs
            if processed is not logits:
                picked = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
                raw = picked - logits.logsumexp(1)
            self.used.add("argmax" if self._is_all_greedy else "inverse_cdf")
        sampled = Sampled(tokens.tolist(), logprobs.tolist(), raw.tolist())
        self._check(sampled, sequences)
        return sampled

    @property
    def _fuses_head(self) -> bool:
        return self._ops.backend == "triton" and self._head.weight is not None and not self._filters

    def _refresh(self, sequences: Sized[Sequence]) -> None:
        """Rebuild the per-row settings, only when the rows changed."""
        if len(self._rows) == len(sequences) and all(
            a is b for a, b in zip(self._rows, sequences, strict=True)
        ):
            return
        self._rows = list(sequences)
        params = [s.params for s in sequences]

        def column(
            values: list[float] | list[int] | list[bool], dtype: torch.dtype
        ) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        self._keys = column([s.key for s in sequences], torch.int64)
        self._uids = column([s.uid for s in sequences], torch.int64)
        self._greedy = column([p.is_greedy for p in params], torch.bool)
        self._temperature = column([p.temperature for p in params], torch.float32)
        # A greedy row is not divided: its log-probabilities are at temperature 1.
        self._divisor = column([p.temperature or 1.0 for p in params], torch.float32).unsqueeze(1)
        self._is_all_greedy = all(p.is_greedy for p in params)
        self._scales = any(p.temperature not in (0, 1) for p in params)
        self._filters = any(p.has_filters for p in params)
        self._penalised = [i for i, p in enumerate(params) if p.repetition_penalty != 1]
        self._minimal = [i for i, p in enumerate(params) if p.min_new_tokens > 0]
        drawn = [SamplingParams() if p.is_greedy else p for p in params]
        self._top_k = [p.top_k for p in drawn] if any(p.top_k for p in drawn) else None
        self._top_p = self._min_p = None
        if any(p.top_p < 1 for p in drawn):
            self._top_p = column([p.top_p for p in drawn], torch.float32).unsqueeze(1)
        if any(p.min_p > 0 for p in drawn):
            self._min_p = column([p.min_p for p in drawn], torch.float32).unsqueeze(1)

    def _process(self, logits: torch.Tensor, sequences: Sized[Sequence]) -> torch.Tensor:
        """Penalties, temperature, top-k, top-p, min-p: HF's processors in HF's order."""
        if not (self._scales or self._filters):
            return logits
        z = logits.clone()
        for row in self._penalised:
            _penalise(z[row], sequences[row])
        for row in self._minimal:
            sequence = sequences[row]
            if len(sequence.output) < sequence.params.min_new_tokens and sequence.end_ids:
                z[row, sorted(sequence.end_ids)] = _MASKED
        if self._scales:
            z /= self._divisor
        if self._top_k is not None:
            # 0 means all tokens; HF too takes no more than there are.
            ks = torch.tensor([min(k, z.shape[1]) or z.shape[1] for k in self._top_k])
            most = max(min(k, z.shape[1]) for k in self._top_k)
            best = z.topk(most, dim=1).values
            kth = best.gather(1, (ks.clamp(max=most) - 1).unsqueeze(1).to(z.device))
            z.masked_fill_((z < kth) & (ks < z.shape[1]).unsqueeze(1).to(z.device), _MASKED)
        if self._top_p is not None:
            ascending, order = z.sort(dim=1)
            out = ascending.softmax(1).cumsum(1) <= 1 - self._top_p
            out[:, -1] = False
            # A row without top-p keeps even what rounds to probability 0.
            out &= self._top_p < 1
            z.masked_fill_(out.scatter(1, order, out), _MASKED)
        if self._min_p is not None:
            probabilities = z.softmax(1)
            z.masked_fill_(
                probabilities < self._min_p * probabilities.amax(1, keepdim=True), _MASKED
            )
        return z

    def _check(self, sampled: Sampled, sequences: Sized[Sequence]) -> None:
        for row, sequence in enumerate(sequences):
            values = (sampled.logprobs[row], sampled.raw_logprobs[row])
            if not all(math.isfinite(value) for value in values):
                raise NonFiniteLogitsError(
                    sequence.prompt_index, len(sequence), f"log-probabilities {values}"
                )


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    seen = torch.tensor(sorted(set(sequence.prompt) | set(sequence.output)), device=row.device)
    scores = row[seen]
    penalty = sequence.params.repetition_penalty
    row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
