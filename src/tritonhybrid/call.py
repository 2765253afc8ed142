"""What one rollout or generate call carries with it."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass, field

import torch

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
    num_samples: int = 0
    num_sampled: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether the token budget is used up."""
        return self.token_budget is not None and self.num_sampled >= self.token_budget

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
