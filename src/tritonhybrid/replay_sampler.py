"""Sampling whose every setting has a fixed address, so that a captured step can be replayed."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass
from typing import Any, Final

import torch

from tritonhybrid.logit_rules import keep_min_p, keep_top_k, keep_top_p
from tritonhybrid.sampler import Drawn, HeadCalls
from tritonhybrid.sequence import Sequence
from tritonhybrid_kernels.ops import Ops

# A top_k that keeps everything: more tokens than any vocabulary has.
_ALL_TOKENS: Final = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class DrawPlan:
    """What a draw computes for all its rows, whichever of them need it.

    Args:
        is_fused: Some rows sample in the head's own kernel.
        is_processed: Some rows sample from logits.
        is_ruled: Some of those sample from other logits than the model's.
        is_scaled: Some of those have a temperature other than 1.
        num_candidates: Tokens that top-k looks at, a power of two; 0 where no row has one.
        has_top_p: Some rows have one.
        has_min_p: Some rows have one.
    """

    is_fused: bool = False
    is_processed: bool = False
    is_ruled: bool = False
    is_scaled: bool = False
    num_candidates: int = 0
    has_top_p: bool = False
    has_min_p: bool = False


class RowSettings:
    """Each row's sampling settings on the device, at fixed addresses.

    A row that a setting does not concern has the value that changes nothing.

    Args:
        capacity: Most rows.
        device: Where the model computes.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._whole = torch.zeros(3, capacity, dtype=torch.int64, device=device)
        self._real = torch.zeros(4, capacity, dtype=torch.float32, device=device)
        self._flags = torch.zeros(3, capacity, dtype=torch.bool, device=device)
        self._rows: list[Sequence] | None = None
        self._num_rows = 0
        self._plan = DrawPlan()

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of all that a draw reads."""
        return self._whole.data_ptr(), self._real.data_ptr(), self._flags.data_ptr()

    def fill(self, sequences: Sized[Sequence], num_rows: int, *, fuses: bool) -> DrawPlan:
        """Write the settings of a step's rows, if they are others than the last step's.

        Args:
            sequences: One a row; none of them has a ``host_rule``.
            num_rows: Rows of the step; those past the sequences are padding.
            fuses: Whether the head has a kernel that samples.

        Returns:
            What must be computed for them.
        """
        rows = list(sequences)
        if rows == self._rows and num_rows == self._num_rows:
            return self._plan
        self._rows, self._num_rows = rows, num_rows
        params = [sequence.params for sequence in rows]
        fused = [fuses and not p.has_filters for p in params]
        drawn = [not (p.is_greedy or is_fused) for p, is_fused in zip(params, fused, strict=True)]
        ks = [p.top_k if is_drawn else 0 for p, is_drawn in zip(params, drawn, strict=True)]
        top_ps = [p.top_p if is_drawn else 1 for p, is_drawn in zip(params, drawn, strict=True)]
        min_ps = [p.min_p if is_drawn else 0 for p, is_drawn in zip(params, drawn, strict=True)]
        divisors = [
            float(p.temperature) if is_drawn else 1.0
            for p, is_drawn in zip(params, drawn, strict=True)
        ]
        whole = [[s.key for s in rows], [s.uid for s in rows]]
        whole.append([k or _ALL_TOKENS for k in ks])
        # A mass of -1 is never reached. 1 - p in double precision, as HF has it.
        real = [[float(p.temperature) for p in params], divisors]
        real += [[1 - p if p < 1 else -1.0 for p in top_ps], [float(p) for p in min_ps]]
        ruled = [
            not is_fused and (p.has_filters or p.temperature not in (0, 1))
            for p, is_fused in zip(params, fused, strict=True)
        ]
        flags = [[p.is_greedy for p in params], fused, ruled]
        self._write(self._whole, whole, (0, 0, _ALL_TOKENS), num_rows)
        self._write(self._real, real, (0.0, 1.0, -1.0, 0.0), num_rows)
        self._write(self._flags, flags, (True, True, False), num_rows)
        most = max(ks, default=0)
        self._plan = DrawPlan(
            is_fused=any(fused),
            is_processed=not all(fused),
            is_ruled=any(ruled),
            is_scaled=any(divisor != 1 for divisor in divisors),
            num_candidates=1 << (most - 1).bit_length() if most else 0,
            has_top_p=any(p < 1 for p in top_ps),
            has_min_p=any(p > 0 for p in min_ps),
        )
        return self._plan

    @staticmethod
    def _write(
        columns: torch.Tensor,
        values: Sized[list[Any]],
        neutral: Sized[float],
        num_rows: int,
    ) -> None:
        """Write rows of settings, and behind them what changes nothing."""
        padded = [v + (num_rows - len(v)) * [n] for v, n in zip(values, neutral, strict=True)]
        columns[:, :num_rows] = torch.tensor(padded, dtype=columns.dtype)

    def columns(self, num_rows: int) -> _Columns:
        """The settings of the first rows: views that stay valid."""
        keys, uids, ks = (column[:num_rows] for column in self._whole)
        temperature, divisor, rest, share = (column[:num_rows] for column in self._real)
        greedy, fused, ruled = (column[:num_rows] for column in self._flags)
        return _Columns(
            keys=keys,
            uids=uids,
            ks=ks.unsqueeze(1),
            temperature=temperature,
            divisor=divisor.unsqueeze(1),
            rest=rest.unsqueeze(1),
            share=share.unsqueeze(1),
            greedy=greedy,
            fused=fused,
            ruled=ruled,
        )


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """[R] each, or [R, 1] where they meet logits."""

    keys: torch.Tensor
    uids: torch.Tensor
    ks: torch.Tensor
    temperature: torch.Tensor
    divisor: torch.Tensor
    rest: torch.Tensor
    share: torch.Tensor
    greedy: torch.Tensor
    fused: torch.Tensor
    ruled: torch.Tensor


class ReplaySampler:
    """Draws what :class:`~tritonhybrid.sampler.Sampler` draws, by the plan in place of the rows.

    Every row goes through all that the plan names, and settings that concern it decide; so
    nothing but values differs between the draws of one plan. A token and its
    log-probabilities have the bits that the other sampler gives them.

    Args:
        ops: The operations to call.
        head: The model's head.
        settings: Of the rows.
        used: Names of the samplers that drew; added to.
    """

    def __init__(self, ops: Ops, head: HeadCalls, settings: RowSettings, used: set[str]) -> None:
        self._ops = ops
        self._head = head
        self._settings = settings
        self._used = used
        # Whether the head has a kernel that samples.
        self._fuses = ops.backend == "triton" and head.weight is not None

    def prepare(self, sequences: Sized[Sequence], num_rows: int) -> DrawPlan:
        """Upload the settings of a step's rows where they changed."""
        plan = self._settings.fill(sequences, num_rows, fuses=self._fuses)
        for sequence in sequences:
            if sequence.params.is_greedy:
                self._used.add("argmax")
            elif self._fuses and not sequence.params.has_filters:
                self._used.add("gumbel_max")
            else:
                self._used.add("inverse_cdf")
        return plan

    def draw(self, hidden: torch.Tensor, positions: torch.Tensor, plan: DrawPlan) -> Drawn:
        """Draw a token for each row on the device.

        Args:
            hidden: [R, D] last hidden states.
            positions: [R] int64, index of the token to be drawn.
            plan: From :meth:`prepare`.
        """
        columns = self._settings.columns(hidden.shape[0])
        if not plan.is_processed:
            return self._draw_fused(hidden, positions, columns)
        processed = self._draw_processed(hidden, positions, columns, plan)
        if not plan.is_fused:
            return processed
        fused = self._draw_fused(hidden, positions, columns)
        is_fused = columns.fused
        return Drawn(
            torch.where(is_fused, fused.tokens, processed.tokens),
            torch.where(is_fused, fused.logprobs, processed.logprobs),
            torch.where(is_fused, fused.raw_logprobs, processed.raw_logprobs),
        )

    def _draw_fused(
        self, hidden: torch.Tensor, positions: torch.Tensor, columns: _Columns
    ) -> Drawn:
        return Drawn(
            *self._ops.lm_head_sample(
                hidden,
                self._head.weight,
                self._head.bias,
                temperature=columns.temperature,
                keys=columns.keys,
                uids=columns.uids,
                positions=positions,
                logit_scale=self._head.scale,
                softcap=self._head.softcap,
            )
        )

    def _draw_processed(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        columns: _Columns,
        plan: DrawPlan,
    ) -> Drawn:
        logits = self._head.logits(hidden)
        z = logits
        if plan.is_ruled:
            z = logits / columns.divisor if plan.is_scaled else logits.clone()
        if plan.num_candidates:
            keep_top_k(z, columns.ks, min(plan.num_candidates, z.shape[1]))
        if plan.has_top_p:
            keep_top_p(z, columns.rest)
        if plan.has_min_p:
            keep_min_p(z, columns.share)
        tokens, logprobs = self._ops.sample_logits(
            z, columns.keys, columns.uids, positions, columns.greedy
        )
        if not plan.is_ruled:
            return Drawn(tokens, logprobs, logprobs)
        raw = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
        raw = torch.where(columns.ruled, raw, logprobs)
        # Greedy log-probabilities are the raw ones.
        return Drawn(tokens, torch.where(columns.greedy, raw, logprobs), raw)
