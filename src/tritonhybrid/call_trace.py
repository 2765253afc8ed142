"""Calls as a file of trace events, for Perfetto and chrome://tracing.

Source: "Trace Event Format", the JSON object format (public document of the Chromium project).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from collections.abc import Sequence as Sized
from pathlib import Path
from types import TracebackType
from typing import Any

from tritonhybrid.call_observer import CallObserver, CallReport, Span, StepReport
from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import RolloutStats

_LANES = {"call": 1, "steps": 2, "ranks": 3}
_STATS = (
    "path",
    "strategy",
    "prompt_tokens",
    "prefill_tokens",
    "shared_tokens",
    "decode_tokens",
    "overrun_tokens",
    "completion_tokens",
    "preemptions",
    "peak_blocks",
    "shared_blocks",
    "evicted_blocks",
)


class CallTrace(CallObserver):
    """Writes what it is told of calls to a file of trace events.

    Times are microseconds of ``time.perf_counter()``, on Linux one clock for all processes
    of a machine. A step's preemptions and ends stand right behind it. Events go to a file by
    another name as they come; closing gives it its own. A context manager that closes.

    Args:
        path: Replaced if it is there.
        rank: The events' process.

    Raises:
        ConfigError: Its directory is not there, or it is one.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path = Path(path)
        check_trace_path(self.path)
        self._rank = rank
        self._scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file = self._scratch.open("w", encoding="utf-8")
        self._num_events = 0
        self._open_call: tuple[str, float] | None = None
        self._file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        self._describe("process_name", 0, f"rank {rank}")
        for lane, thread in _LANES.items():
            self._describe("thread_name", thread, lane)

    def __enter__(self) -> CallTrace:
        """Nothing more: the file is open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Complete the file; what comes later is not recorded."""
        if self._file.closed:
            return
        try:
            if self._open_call is not None:
                kind, start_s = self._open_call
                self._complete(kind, "call", start_s, time.perf_counter(), {"is_over": False})
            self._file.write("\n]}\n")
            self._file.close()
            self._scratch.replace(self.path)
        finally:
            self._file.close()
            self._scratch.unlink(missing_ok=True)

    def on_begin(self, kind: str, start_s: float) -> None:
        """Remember the call: its event is written when it is over."""
        self._open_call = (kind, start_s)

    def on_span(self, span: Span) -> None:
        """Write a part of a call."""
        self._complete(span.name, span.lane, span.start_s, span.start_s + span.seconds, span.counts)

    def on_step(self, step: StepReport) -> None:
        """Write a step and its preemptions."""
        counts = {
            "rows": step.num_prompts + step.num_decoding,
            "prompts": step.num_prompts,
            "decoding": step.num_decoding,
            "steps": step.num_steps,
            "prefill_tokens": step.prefill_tokens,
            "decode_tokens": step.decode_tokens,
            "kept_tokens": step.kept_tokens,
            "overrun_tokens": step.overrun_tokens,
            "pages_used": step.used_blocks,
            "pages_shared": step.shared_blocks,
        }
        self._complete(step.kind, "steps", step.start_s, step.start_s + step.seconds, counts)
        for _ in range(step.preemptions):
            self._instant("preempt", {})

    def on_finish(self, sequences: Sized[Sequence]) -> None:
        """Write who ended, and how."""
        for sequence in sequences:
            self._instant(
                "finish",
                {
                    "prompt_index": sequence.prompt_index,
                    "sample_index": sequence.sample_index,
                    "prompt_tokens": len(sequence.prompt),
                    "tokens": len(sequence.output),
                    "reason": str(sequence.finish_reason),
                },
            )

    def on_end(self, report: CallReport) -> None:
        """Write the call."""
        self._open_call = None
        end_s = report.start_s + report.stats.total_s
        counts = _counts(report.stats)
        if report.error is not None:
            counts["error"] = report.error
        self._complete(report.kind, "call", report.start_s, end_s, counts)

    def _complete(
        self,
        name: str,
        lane: str,
        start_s: float,
        end_s: float,
        counts: Mapping[str, int | float | str],
    ) -> None:
        # Both ends rounded down alike, so that what nests or follows still does.
        start = _microseconds(start_s)
        self._write(
            {"name": name, "ph": "X", "ts": start, "dur": _microseconds(end_s) - start},
            lane,
            counts,
        )

    def _instant(self, name: str, counts: Mapping[str, int | float | str]) -> None:
        event = {"name": name, "ph": "i", "ts": _microseconds(time.perf_counter()), "s": "t"}
        self._write(event, "steps", counts)

    def _write(
        self, event: dict[str, Any], lane: str, counts: Mapping[str, int | float | str]
    ) -> None:
        if not self._file.closed:
            self._put({**event, "pid": self._rank, "tid": _LANES[lane], "args": dict(counts)})

    def _describe(self, what: str, thread: int, name: str) -> None:
        self._put(
            {"name": what, "ph": "M", "ts": 0, "pid": self._rank, "tid": thread}
            | {"args": {"name": name}}
        )

    def _put(self, event: dict[str, Any]) -> None:
        self._file.write(("," if self._num_events else "") + "\n" + json.dumps(event))
        self._num_events += 1


def check_trace_path(path: Path) -> None:
    """Refuse a path at which no file can be.

    Raises:
        ConfigError: Its directory is not there, or it is one.
    """
    if path.is_dir() or not path.parent.is_dir():
        got = f"the directory {path}" if path.is_dir() else f"no directory {path.parent}"
        raise ConfigError(
            explain(
                "A trace is written to a file in a directory that is there",
                expected="the name of a file",
                got=got,
                hint="Name another file, or make the directory.",
            )
        )


def rank_path(path: str | Path, rank: int, world_size: int) -> Path:
    """Name the file of one rank: the path itself where there is one rank only."""
    path = Path(path)
    return path if world_size == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def _counts(stats: RolloutStats) -> dict[str, int | float | str]:
    return {name: getattr(stats, name) for name in _STATS}


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)
