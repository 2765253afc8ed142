"""Gate first, then interleaved rounds: one workload, all contestants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from gate import Tokens, agreement, first_difference
from provider import Provider
from report import Row
from timing import Spread, describe_error, interleave, spread, wall_timer
from workloads import Workload

OURS = "tritonhybrid"


@dataclass(frozen=True)
class Contestant:
    """A provider still to be made; making it may fail, and that is a result too."""

    name: str
    make: Callable[[], Provider]


@dataclass(frozen=True)
class Field:
    """The contestants of one dtype, the reference first, and what frees their memory."""

    contestants: list[Contestant]
    close: Callable[[], None] = lambda: None


class Together(Protocol):
    """What the ranks of a run agree on."""

    def synchronize(self) -> None: ...

    def every(self, flag: bool) -> bool: ...

    def slowest(self, seconds: float) -> float: ...


@dataclass
class Outcome:
    """Everything one workload showed, by provider name.

    Attributes:
        names: all contestants, in order; the first is the reference of the gate.
        seconds: of each round, for those that passed the gate.
        failures: why a contestant has no (or fewer) rounds, ready to print.
        agreement: share of tokens equal to the reference's in the timed dtype.
        facts: what each provider says of itself.
    """

    names: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)


class GateError(RuntimeError):
    """The reference itself could not answer, so nothing can be compared."""


def compare(
    field_of: Callable[[str], Field],
    dtype: str,
    rounds: int,
    together: Together,
    announce: Callable[[str], None] = lambda name: None,
) -> Outcome:
    """Gate every contestant in fp32, then time those that passed in `dtype`.

    Args:
        field_of: the contestants for a dtype, all on the same weights.
        rounds: how often each is timed.
        together: the ranks this one runs with.
        announce: told each contestant's name before it runs.

    Raises:
        GateError: the first contestant, the reference, failed.
    """
    outcome = Outcome()
    contestants = field_of("fp32")
    passed = _answer_all(contestants.contestants, outcome, together, announce, gate=True)
    if dtype != "fp32":
        _close(passed)
        contestants.close()
        contestants = field_of(dtype)
        passed = _answer_all(contestants.contestants, outcome, together, announce, gate=False)
    seconds = wall_timer(together.synchronize)

    def timer(call: Callable[[], object]) -> float:
        failure: list[Exception] = []

        def guarded() -> None:
            try:
                call()
            except Exception as error:
                failure.append(error)

        elapsed = seconds(guarded)
        if not together.every(not failure):
            raise failure[0] if failure else RuntimeError("another rank failed")
        return together.slowest(elapsed)

    calls = {}
    for provider in passed:

        def call(provider: Provider = provider) -> Tokens:
            announce(provider.name)
            return provider.run()

        calls[provider.name] = call
    timed = interleave(calls, rounds, timer=timer)
    outcome.seconds = {name: values for name, values in timed.seconds.items() if values}
    for name, error in timed.errors.items():
        outcome.failures[name] = f"failed while timed: {error}"
    for provider in passed:
        outcome.facts[provider.name] = provider.facts()
    _close(passed)
    contestants.close()
    return outcome


def _close(providers: list[Provider]) -> None:
    for provider in providers:
        provider.close()
    providers.clear()


def _answer_all(
    contestants: Iterable[Contestant],
    outcome: Outcome,
    together: Together,
    announce: Callable[[str], None],
    *,
    gate: bool,
) -> list[Provider]:
    """Run each contestant once and return those that may be timed."""
    reference: Tokens | None = None
    passed: list[Provider] = []
    for contestant in contestants:
        name = contestant.name
        if gate:
            outcome.names.append(name)
        elif name in outcome.failures:
            continue
        announce(name)
        tokens: Tokens = []
        failure = ""
        made: Provider | None = None
        try:
            made = dataclasses.replace(contestant.make(), name=name)
            tokens = made.run()
        except Exception as error:
            failure = f"failed: {describe_error(error)}"
        if not together.every(not failure):
            outcome.failures[name] = failure or "failed: another rank failed"
            if made is not None:
                made.close()
            if reference is None:
                raise GateError(f"the reference {name} {outcome.failures[name]}")
            continue
        reference = tokens if reference is None else reference
        outcome.agreement[name] = agreement(reference, tokens)
        if gate:
            difference = first_difference(reference, tokens)
            if not together.every(difference is None):
                place = difference or "another rank's tokens differ"
                outcome.failures[name] = f"gate failed: {place} (fp32 greedy)"
                made.close()
                continue
        passed.append(made)
    return passed


def rows_of(outcome: Outcome, workload: Workload, dtype: str) -> list[Row]:
    """Turn an outcome into rows: speeds, failures, then our ratios to every other provider."""
    label = f"{workload.name} {dtype}"
    per_rank = "_a_rank" if workload.ranks > 1 else ""
    rows: list[Row] = []
    for name in outcome.names:
        if name in outcome.seconds:
            speeds = [workload.real_tokens / each for each in outcome.seconds[name]]
            rows.append(Row(label, name, f"tokens_per_s{per_rank}", "tokens/s", spread(speeds)))
            share = outcome.agreement[name]
            rows.append(
                Row(label, name, "greedy_agreement", "fraction", Spread(share, share, share))
            )
        if name in outcome.failures:
            rows.append(Row(label, name, outcome.failures[name]))
    ours = [name for name in outcome.seconds if name.startswith(OURS)]
    for mine in ours:
        for name, theirs in outcome.seconds.items():
            if name in ours or name in outcome.failures or mine in outcome.failures:
                continue
            # Round by round, so that a slow spell of the machine cancels.
            ratios = [other / own for own, other in zip(outcome.seconds[mine], theirs, strict=True)]
            rows.append(Row(label, f"{mine} / {name}", "speedup", "x", spread(ratios)))
    return rows
