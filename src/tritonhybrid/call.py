"""What one rollout or generate call carries with it."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass, field

import torch

from tritonhybrid.interrupts import InterruptsHeld
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
        stats: Filled as the call goes on.
    """

    seed: int
    collective: CollectiveCall
    interrupts: InterruptsHeld
    stats: RolloutStats = field(default_factory=RolloutStats)
    num_samples: int = 0

    def count(self, sequences: Sized[Sequence]) -> None:
        """Count the tokens of finished sequences."""
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
