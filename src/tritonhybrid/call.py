"""What one rollout or generate call carries with it."""

from __future__ import annotations

import time
from collections.abc import Sequence as Sized
from dataclasses import dataclass, field
from typing import Literal

import torch

from tritonhybrid.call_observer import CallObserver, Span
from tritonhybrid.interrupts import InterruptsHeld
from tritonhybrid.rollout_output import PausedRollout
from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import RolloutStats
from tritonhybrid.weights.agreement import CollectiveCall


@dataclass(kw_only=True)
class Call:
    """What one rollout or generate call carries with it.

    Args:
        seed: For sampling that names none.
        collective: Every rank's call; the ranks meet on its way.
        interrupts: Hold Ctrl-C back; let it through where nothing is left half done.
        policy_version: Of the weights: the engine's optimizer steps.
        stats: Filled as the call goes on.
        token_budget: Tokens after which the call stops at the end of a step; None sets none.
        max_num_seqs: Most of its sequences in flight, where the settings don't say fewer.
        resumed: The rollout that it goes on with.
        paused: What it leaves undone.
        aborts: Prompts that the caller gives up; taken note of after each step.
        is_given_up: Whether the caller wants no more of it at all.
        observers: Told of its parts, steps and ends as they are over; mostly none.
    """

    seed: int
    collective: CollectiveCall
    interrupts: InterruptsHeld
    policy_version: int = 0
    stats: RolloutStats = field(default_factory=RolloutStats)
    token_budget: int | None = None
    max_num_seqs: int | None = None
    resumed: PausedRollout | None = None
    paused: PausedRollout | None = None
    aborts: list[int] = field(default_factory=list)
    is_given_up: bool = False
    observers: Sized[CallObserver] = ()
    num_samples: int = 0
    num_sampled: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether the token budget is used up."""
        return self.token_budget is not None and self.num_sampled >= self.token_budget

    def tell_sequences(self, sequences: Sized[Sequence]) -> None:
        """Tell the observers what will be sampled."""
        for observer in self.observers:
            observer.on_admit(sequences)

    def tell_finished(self, sequences: Sized[Sequence]) -> None:
        """Tell the observers what ended."""
        if sequences:
            for observer in self.observers:
                observer.on_finish(sequences)

    def tell_span(
        self,
        name: str,
        lane: Literal["call", "steps", "ranks"],
        start_s: float,
        seconds: float | None = None,
        **counts: int | float | str,
    ) -> None:
        """Tell the observers of a part of the call.

        Args:
            name: What was done.
            lane: As in ``Span``.
            start_s: ``time.perf_counter()`` of its beginning.
            seconds: How long it took; None means until now.
            counts: What was counted in it.
        """
        if not self.observers:
            return
        if seconds is None:
            seconds = time.perf_counter() - start_s
        span = Span(name=name, lane=lane, start_s=start_s, seconds=seconds, counts=counts)
        for observer in self.observers:
            observer.on_span(span)

    def note_meeting(self, start_s: float, seconds: float) -> None:
        """Count what a meeting with the other ranks took."""
        self.stats.sync_s += seconds
        self.tell_span("meet", "ranks", start_s, seconds)

    def count(self, sequences: Sized[Sequence]) -> None:
        """Count the tokens of the call's sequences."""
        self.num_samples = len(sequences)
        firsts = {s.prompt_index: len(s.prompt) for s in sequences}
        self.stats.prompt_tokens = sum(firsts.values())
        self.stats.completion_tokens = sum(len(s.output) for s in sequences)

    def count_decoded(
        self, prompts: torch.Tensor, mask: torch.Tensor | None, rows: torch.Tensor, pad: int | None
    ) -> None:
        """Count what one of HF's own decodings returned.

        Args:
            prompts: [B, T] token ids.
            mask: [B, T], 1 on real tokens; None says all are.
            rows: [B * n, T + new] token ids.
            pad: Fills a row past its end; None where nothing does.
        """
        new = rows[:, prompts.shape[1] :]
        self.num_samples = rows.shape[0]
        self.stats.prompt_tokens = int(mask.sum()) if mask is not None else prompts.numel()
        # What stands before a row's last real token is real, even if it looks like padding.
        real = torch.ones_like(new) if pad is None else new.ne(pad).long()
        self.stats.completion_tokens = int(real.flip(1).cummax(1).values.sum())
