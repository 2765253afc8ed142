"""All that a wrapped engine has more than a plain one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tritonhybrid.config import HybridConfig
from tritonhybrid.generation import Generation
from tritonhybrid.latency import LatencyClock
from tritonhybrid.stats import LatencyReport, RolloutStats


@dataclass
class EngineState:
    """All that a wrapped engine has more than a plain one.

    Args:
        original_class: The engine's class before.
        config: Settings.
        generation: Serves the calls.
        seeds: The next seed of calls that name none.
        had_generate: The module's own instance attribute ``generate``, if any.
    """

    original_class: type
    config: HybridConfig
    generation: Generation
    seeds: int
    had_generate: Any
    clock: LatencyClock = field(default_factory=LatencyClock)
    stats: RolloutStats = field(default_factory=RolloutStats)
    latency: LatencyReport | None = None
    is_busy: bool = False

    def next_seed(self) -> int:
        """Advance the private counter; torch's generators are not touched."""
        self.seeds += 1
        return self.seeds
