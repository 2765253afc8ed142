"""Interleaved wall-clock rounds, and their p20, p50 and p80."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Return the percentiles of at least one value, interpolated between neighbours."""
    ordered = sorted(values)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Spread(at(0.2), median(ordered), at(0.8))


def describe_error(error: BaseException) -> str:
    """Return an exception in one line, with the innermost place it came from."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[:300]}{place}"


@dataclass
class Rounds:
    """Seconds of each provider in each round, and what stopped those that failed."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    timer: Callable[[Callable[[], object]], float],
    deadline: float | None = None,
) -> Rounds:
    """Time every call once a round, each round starting one call later.

    Interleaving spreads a slow spell of the machine over all providers; rotation keeps none of
    them always behind the same neighbour. A call that raises leaves the later rounds. After
    `deadline` (monotonic seconds) no further round starts, but one always runs.
    """
    result = Rounds(seconds={name: [] for name in calls})
    names = list(calls)
    for index in range(rounds):
        if index and deadline is not None and time.monotonic() > deadline:
            break
        shift = index % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            if name in result.errors:
                continue
            try:
                result.seconds[name].append(timer(calls[name]))
            except Exception as error:
                result.errors[name] = describe_error(error)
    return result


def wall_timer(synchronize: Callable[[], object]) -> Callable[[Callable[[], object]], float]:
    """Return a timer of whole calls; `synchronize` drains the device before and after."""

    def seconds(call: Callable[[], object]) -> float:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - start

    return seconds
