"""How far a rollout is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Sized

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from tritonhybrid.call_observer import CallObserver, CallReport, StepReport
from tritonhybrid.sequence import Sequence

BAR_EVERY_S = 0.1
LINE_EVERY_S = 10.0


class ProgressBar(CallObserver):
    """Shows completions done, real tokens a second and the time left of one call.

    Draws from the calling thread only, after steps. The time left supposes that tokens come
    as fast as so far and that what has not ended runs to its ``max_new_tokens``.

    Args:
        console: Where to draw; a rich console on stderr by default.
        clock: Seconds.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start_s = self._shown_s = 0.0
        self._num_sequences = self._num_done = 0
        self._num_tokens = 0
        # Tokens that may still be sampled.
        self._most_left = 0

    def on_admit(self, sequences: Sized[Sequence]) -> None:
        """Begin to draw."""
        self._num_sequences = len(sequences)
        self._most_left = sum(s.max_length - len(s) for s in sequences)
        self._start_s = self._shown_s = self._clock()
        if self._console.is_terminal and sequences:
            self._bar = Progress(
                TextColumn("rollout"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
                auto_refresh=False,
                # Else what a stream's consumer prints would go to stderr.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("rollout", total=self._num_sequences, facts="")
            self._bar.refresh()

    def on_step(self, step: StepReport) -> None:
        """Count tokens; draw if it is time."""
        if not self._num_tokens:
            # Gathering and binding come once and say nothing of how fast tokens come.
            self._start_s = self._clock() - step.seconds
        self._num_tokens += step.kept_tokens
        self._most_left -= step.kept_tokens
        self._show_if_due()

    def on_finish(self, sequences: Sized[Sequence]) -> None:
        """Count completions."""
        self._num_done += len(sequences)
        self._most_left -= sum(s.max_length - len(s) for s in sequences)

    def on_end(self, report: CallReport) -> None:
        """Draw the last state and leave the terminal as it was."""
        if self._num_sequences:
            self._show()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_if_due(self) -> None:
        every_s = BAR_EVERY_S if self._bar is not None else LINE_EVERY_S
        if self._clock() - self._shown_s >= every_s:
            self._show()

    def _show(self) -> None:
        self._shown_s = self._clock()
        seconds = self._shown_s - self._start_s
        rate = self._num_tokens / seconds if seconds > 0 else 0.0
        facts = f"{rate:,.0f} tokens/s"
        if rate and self._most_left > 0:
            facts += f", about {self._most_left / rate:,.0f} s left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._num_done, facts=facts, refresh=True)
        else:
            self._console.print(f"rollout {self._num_done}/{self._num_sequences} {facts}")
