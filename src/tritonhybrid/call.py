"""What one rollout or generate call carries with it."""

from __future__ import annotations

from collections.abc import Sequence as Sized
from dataclasses import dataclass, field

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
