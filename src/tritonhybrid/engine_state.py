"""All that a wrapped engine has more than a plain one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from tritonhybrid.call import Call
from tritonhybrid.config import HybridConfig
from tritonhybrid.errors import EngineStateError, explain
from tritonhybrid.generation import Generation
from tritonhybrid.interrupts import InterruptsHeld
from tritonhybrid.latency import LatencyClock
from tritonhybrid.stats import LatencyReport, RolloutStats
from tritonhybrid.weights.agreement import CollectiveCall


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

    @contextmanager
    def call(self) -> Iterator[Call]:
        """One rollout or generate call: not nested, timed, its failure every rank's.

        Ctrl-C waits inside, except where the call lets it through, so that it can't come
        between a block and its undoing.

        Raises:
            EngineStateError: Another call is under way.
            RankFailureError: Another rank failed.
        """
        if self.is_busy:
            raise EngineStateError(
                explain(
                    "Calls of one engine don't nest",
                    expected="no rollout or generate under way",
                    got="a call from inside another (or from a second thread)",
                    hint="Wait until the first has returned.",
                )
            )
        with InterruptsHeld() as interrupts:
            # A private counter: torch's generators are not touched.
            self.seeds += 1
            collective = CollectiveCall(self.generation.source.agreement)
            call = Call(seed=self.seeds, collective=collective, interrupts=interrupts)
            start = time.perf_counter()
            self.is_busy = True
            try:
                with collective:
                    yield call
                    # A Ctrl-C by now is this call's failure, and with it every rank's.
                    interrupts.deliver()
            finally:
                self.is_busy = False
                if self.config.release_inference_cache:
                    self.generation.release()
                call.stats.total_s = time.perf_counter() - start
                self.stats = call.stats
                self.clock.on_call(call.stats, call.num_samples * world_size())


def world_size() -> int:
    """Ranks that call together."""
    return dist.get_world_size() if dist.is_initialized() else 1
