"""What the demo shows: progress while it runs, a table at the end, a picture of the reward."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tritonhybrid.demo.record import GOAL_END, GOAL_START, DemoRecord

PLAIN_LINE_EVERY_S = 5.0
WRITE_EVERY_S = 2.0


class Report:
    """Shows one run on the terminal and keeps its files up to date.

    Args:
        record: What is measured; read whenever something is shown.
        out_dir: Takes ``metrics.json`` and ``reward.png``; made when missing.
        console: Where to write; a rich console on stdout by default.
    """

    def __init__(self, record: DemoRecord, out_dir: Path, console: Console | None = None) -> None:
        self.record = record
        self.out_dir = out_dir
        self.console = console or Console(highlight=False)
        self._written_at = 0.0
        out_dir.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Write one line."""
        self.console.print(text)

    @contextmanager
    def stage(self, name: str, num_steps: int) -> Iterator[Stage]:
        """Show the progress of ``num_steps`` steps: a bar, or plain lines where no one watches."""
        if not self.console.is_terminal:
            yield PlainStage(self, name, num_steps)
            return
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=num_steps, facts="")
            yield BarStage(self, progress, task)

    def save(self, *, force: bool = False) -> None:
        """Bring ``metrics.json`` up to date, at most every two seconds unless forced."""
        if force or time.monotonic() - self._written_at >= WRITE_EVERY_S:
            self.record.write(self.out_dir / "metrics.json")
            self._written_at = time.monotonic()

    def finish(self) -> None:
        """Write both files, then show the table and where the files are."""
        self.save(force=True)
        draw_reward(self.record, self.out_dir / "reward.png")
        if self.record.state == "finished":
            self.console.print(summary_table(self.record))
        self.say(f"wrote {self.out_dir / 'metrics.json'} and {self.out_dir / 'reward.png'}")


class Stage:
    """Takes note of each step; the two ways of showing it derive from this."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def advance(self, facts: str) -> None:
        """Count one step, say something about it, keep the files up to date."""
        self._report.save()


class BarStage(Stage):
    """A progress bar."""

    def __init__(self, report: Report, progress: Progress, task: TaskID) -> None:
        super().__init__(report)
        self._progress = progress
        self._task = task

    def advance(self, facts: str) -> None:
        """Move the bar."""
        super().advance(facts)
        self._progress.update(self._task, advance=1, facts=facts)


class PlainStage(Stage):
    """A line now and then, with the same facts."""

    def __init__(self, report: Report, name: str, num_steps: int) -> None:
        super().__init__(report)
        self._name = name
        self._num_steps = num_steps
        self._done = 0
        self._begin = self._said_at = time.monotonic()

    def advance(self, facts: str) -> None:
        """Write a line every five seconds and on the last step."""
        super().advance(facts)
        self._done += 1
        now = time.monotonic()
        is_last = self._done == self._num_steps
        if is_last or now - self._said_at >= PLAIN_LINE_EVERY_S:
            self._said_at = now
            left_s = (now - self._begin) / self._done * (self._num_steps - self._done)
            self._report.say(
                f"{self._name} {self._done}/{self._num_steps} {facts} {left_s:.0f} s left"
            )


def summary_table(record: DemoRecord) -> Table:
    """Lay the whole run out as a table of two columns."""
    table = Table(show_header=False, title="tritonhybrid demo")
    settings = record.settings
    where = f"ZeRO-{settings['zero']}, {settings['ranks']} rank(s), {settings['device']}"
    table.add_row("engine", f"{where}, float32")
    stats = record.rollout_stats
    if stats:
        parts = (stats["path"], stats["backend"], stats["strategy"], stats["sampler"])
        table.add_row("rollout path", ", ".join(part for part in parts if part))
    table.add_section()
    if record.reward_start is not None and record.reward_end is not None:
        table.add_row(
            "verified reward, sampled", f"{record.reward_start:.3f} -> {record.reward_end:.3f}"
        )
    if record.greedy_start is not None and record.greedy_end is not None:
        table.add_row(
            "verified reward, greedy", f"{record.greedy_start:.3f} -> {record.greedy_end:.3f}"
        )
    goal = f"from <= {GOAL_START:.2f} to >= {GOAL_END:.2f}"
    table.add_row("goal", f"{goal}: {'met' if record.is_goal_met else 'not met'}")
    table.add_section()
    table.add_row("start-up", f"{record.start_up_s:.1f} s")
    table.add_row("warm-up", f"{record.warm_up_s:.1f} s")
    table.add_row("rollout", f"{record.seconds('rollout_s'):.1f} s")
    table.add_row("  of it gather", f"{record.seconds('gather_s'):.2f} s")
    table.add_row("training", f"{record.seconds('training_s'):.1f} s")
    table.add_row("whole run", f"{record.total_s:.1f} s")
    table.add_section()
    if record.comparison is not None:
        ours, theirs = record.comparison.ours.tokens_per_s, record.comparison.theirs.tokens_per_s
        table.add_row("rollout speed", f"{ours:,.0f} tokens/s")
        ratio = f" (rollout is {ours / theirs:.2f}x)" if theirs else ""
        table.add_row("HF generate, plain copy", f"{theirs:,.0f} tokens/s{ratio}")
        table.add_row("greedy tokens equal to HF's", str(record.comparison.greedy))
    drift = record.drift
    table.add_row(
        "|rollout - training| logprob",
        f"mean {drift.mean_abs:.1e}, max {drift.max_abs:.1e} over {drift.num_tokens:,} tokens",
    )
    table.add_row("k3-KL(rollout || training)", f"{drift.mean_k3:.1e}")
    return table


def draw_reward(record: DemoRecord, path: Path) -> None:
    """Draw the reward of every GRPO step and the two held-out measurements."""
    # The canvas of a bare Figure is Agg: no display and no global backend is touched.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    rewards = [step.reward for step in record.steps]
    axes.plot(range(1, len(rewards) + 1), rewards, color="tab:blue", label="rollouts of the step")
    ends = [
        (x, y)
        for x, y in ((0, record.reward_start), (len(rewards), record.reward_end))
        if y is not None
    ]
    if ends:
        axes.plot(*zip(*ends, strict=True), "o", color="tab:orange", label="held-out prompts")
    axes.axhline(GOAL_END, color="grey", linestyle=":", label="goal")
    axes.set(xlabel="GRPO step", ylabel="verified reward, sampled", ylim=(0, 1))
    axes.legend(loc="lower right")
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    figure.savefig(scratch, dpi=120)
    scratch.replace(path)
