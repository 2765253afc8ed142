"""All that a wrapped engine has more than a plain one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tritonhybrid.call import Call
from tritonhybrid.call_observer import CallObserver, CallReport
from tritonhybrid.call_trace import CallTrace
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
        observers: Told of every call.
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
    observers: list[CallObserver] = field(default_factory=list)

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
        self,
        kind: str,
        token_budget: int | None = None,
        max_num_seqs: int | None = None,
        observers: Sequence[CallObserver] = (),
    ) -> Iterator[Call]:
        """One rollout or generate call: not nested, timed, its failure every rank's.

        Ctrl-C waits inside, except where the call lets it through, so that it can't come
        between a block and its undoing.

        Args:
            kind: What it is called, by those who watch it.
            token_budget: Tokens after which the call stops; None sets no limit.
            max_num_seqs: Most sequences in flight; None leaves it to the settings.
            observers: Told of this call, beside those of every call.

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
                observers=(*self.observers, *observers),
            )
            collective.on_met = call.note_meeting
            start = time.perf_counter()
            self.is_busy = True
            failure: BaseException | None = None
            try:
                with collective:
                    for observer in call.observers:
                        observer.on_begin(kind, start)
                    _check_limit("token_budget", token_budget)
                    _check_limit("max_num_seqs", max_num_seqs)
                    yield call
                    # A Ctrl-C by now is this call's failure, and with it every rank's.
                    interrupts.deliver()
            except BaseException as error:
                failure = error
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
                name = None if failure is None else type(failure).__name__
                report = CallReport(kind=kind, start_s=start, stats=call.stats, error=name)
                with ExitStack() as told:
                    # Each of them closes what it has opened, whatever becomes of the others.
                    for observer in call.observers:
                        told.callback(observer.on_end, report)

    @contextmanager
    def traced(self, path: Path, rank: int) -> Iterator[CallTrace]:
        """Record every call that begins inside.

        Args:
            path: Of this rank's file.
            rank: The trace's process.

        Raises:
            ConfigError: The path is no file's.
        """
        with CallTrace(path, rank) as trace:
            self.observers.append(trace)
            try:
                yield trace
            finally:
                self.observers.remove(trace)


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
