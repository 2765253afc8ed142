"""What every contestant is to the bench: a name, a call that returns tokens, and its facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gate import Tokens


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way of answering a workload.

    Attributes:
        name: as it stands in the result files.
        run: answers the whole workload and returns the real tokens of each sample.
        facts: attention backend, compile and graph state, and what else explains the figure;
    """

    name: str
    run: Callable[[], Tokens]
    facts: Callable[[], dict[str, str]] = field(default=dict)
    close: Callable[[], None] = lambda: None
