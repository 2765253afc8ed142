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
from tritonhybrid.errors import ConfigError, EngineStateError, explain
from tritonhybrid.generation import Generation
from tritonhybrid.interrupts import InterruptsHeld
from tritonhybrid.latency import LatencyClock
from tritonhybrid.stats import RolloutStats
from tritonhybrid.weights.agreement import CollectiveCall


@dataclass
class EngineState:
    """All that a wrapped engine has more than a plain one.

    Args:
        original_class: The engine's class before.
        config: Settings.
        generation: Serves the calls.
        seeds: The next seed of calls that name none.
        policy_version: Optimizer steps that the weights have seen.
        had_generate: The module's own instance attribute ``generate``, if any.
    """

    original_class: type
    config: HybridConfig
    generation: Generation
    seeds: int
    had_generate: Any
    policy_version: int = 0
    clock: LatencyClock = field(default_factory=LatencyClock)
    stats: RolloutStats = field(default_factory=RolloutStats)
    is_busy: bool = False

    def require_idle(self, act: str) -> None:
        """Refuse what must not come between the steps of a rollout.

        Raises:
            EngineStateError: A rollout or generate is under way.
        """
        if self.is_busy:
            raise EngineStateError(
                explain(
                    f"{act} waits until a rollout has ended",
                    expected="no rollout, stream or generate under way",
                    got=f"{act} while one is",
                    hint="Exhaust or close the rollout stream first (a with block does).",
                )
            )

    def use_new_weights(self, policy_version: int) -> None:
        """What was computed with the old weights serves no later call."""
        self.policy_version = policy_version
        self.generation.forget()

    @contextmanager
    def call(
        self, token_budget: int | None = None, max_num_seqs: int | None = None
    ) -> Iterator[Call]:
        """One rollout or generate call: not nested, timed, its failure every rank's.

        Ctrl-C waits inside, except where the call lets it through, so that it can't come
        between a block and its undoing.

        Args:
            token_budget: Tokens after which the call stops; None sets no limit.
            max_num_seqs: Most sequences in flight; None leaves it to the settings.

        Raises:
            EngineStateError: Another call is under way.
            ConfigError: A limit is out of range.
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
            call = Call(
                seed=self.seeds,
                collective=collective,
                interrupts=interrupts,
                policy_version=self.policy_version,
                token_budget=token_budget,
                max_num_seqs=max_num_seqs,
            )
            start = time.perf_counter()
            self.is_busy = True
            try:
                with collective:
                    _check_limit("token_budget", token_budget)
                    _check_limit("max_num_seqs", max_num_seqs)
                    yield call
                    # A Ctrl-C by now is this call's failure, and with it every rank's.
                    interrupts.deliver()
            except BaseException:
                self.generation.abandon(call)
                raise
            finally:
                self.is_busy = False
                if self.config.release_inference_cache:
                    self.generation.release()
                call.stats.total_s = time.perf_counter() - start
                call.stats.latency = self.stats.latency
                self.stats = call.stats
                self.clock.on_call(call.stats, call.num_samples * world_size())


def _check_limit(name: str, value: object) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (is_whole and value >= 1):  # type: ignore[operator]
        return
    raise ConfigError(
        explain(
            f"{name} is out of range",
            expected="a whole number >= 1, or None",
            got=repr(value),
            hint=f"Pass {name}=1 or more, or leave it out.",
        )
    )


def world_size() -> int:
    """Ranks that call together."""
    return dist.get_world_size() if dist.is_initialized() else 1
