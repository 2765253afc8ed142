"""What somebody who watches a call is told: its parts, its steps, what ended, its end."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sized
from dataclasses import dataclass, field
from typing import Literal

from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import RolloutStats


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a call that is over.

    Args:
        name: What was done.
        lane: Spans of one lane nest or follow each other: "call" is what this rank does,
            "steps" the steps of its loop, "ranks" its meetings with other ranks.
        start_s: ``time.perf_counter()`` of its beginning.
        seconds: How long it took.
        counts: What was counted in it; never tokens or text.
    """

    name: str
    lane: Literal["call", "steps", "ranks"]
    start_s: float
    seconds: float
    counts: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A step of the loop that is over; the sums over a call are in its stats.

    Args:
        start_s: ``time.perf_counter()`` of its beginning.
        seconds: As ``prefill_s`` or ``decode_s`` count them.
        num_prompts: Prompts, or chunks of them, that were computed.
        num_decoding: Running sequences that got tokens.
        num_steps: Tokens sampled for each of them.
        prefill_tokens: Tokens of prompts computed.
        decode_tokens: As ``stats.decode_tokens`` counts them.
        kept_tokens: All tokens sampled and kept, those that follow a prompt among them.
        overrun_tokens: Tokens sampled past an end and cut.
        used_blocks: Cache pages in use.
        shared_blocks: Those of them that stand in more than one table.
        preemptions: Sequences that were set back for want of pages.
    """

    start_s: float
    seconds: float
    num_prompts: int = 0
    num_decoding: int = 0
    num_steps: int = 1
    prefill_tokens: int = 0
    decode_tokens: int = 0
    kept_tokens: int = 0
    overrun_tokens: int = 0
    used_blocks: int = 0
    shared_blocks: int = 0
    preemptions: int = 0

    @property
    def kind(self) -> Literal["prefill step", "decode step", "mixed step"]:
        """What it computed."""
        if not self.num_prompts:
            return "decode step"
        return "mixed step" if self.num_decoding else "prefill step"


@dataclass(frozen=True, kw_only=True)
class CallReport:
    """A call that is over.

    Args:
        kind: "rollout", "rollout_stream", "resume" or "generate".
        start_s: ``time.perf_counter()`` of its beginning.
        stats: Complete.
        error: Name of the type of what it raises; None where it returns.
    """

    kind: str
    start_s: float
    stats: RolloutStats
    error: str | None = None


class CallObserver:
    """Somebody who watches calls; each method is called on the calling thread, in order.

    What one raises is the call's failure. A subclass overrides what it has use for.
    """

    def on_begin(self, kind: str, start_s: float) -> None:
        """A call begins; its arguments have not been looked at.

        Args:
            kind: As in :class:`CallReport`.
            start_s: ``time.perf_counter()`` of its beginning.
        """

    def on_admit(self, sequences: Sized[Sequence]) -> None:
        """All that the call will sample is known; some of it may be there already."""

    def on_span(self, span: Span) -> None:
        """A part of the call is over."""

    def on_step(self, step: StepReport) -> None:
        """A step is over."""

    def on_finish(self, sequences: Sized[Sequence]) -> None:
        """Sequences ended, or were aborted."""

    def on_end(self, report: CallReport) -> None:
        """The call is over, also where it fails; comes once, whatever came before."""
