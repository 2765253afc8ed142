"""The clock behind DeepSpeed's latency report: one cycle from eval() to eval()."""

from __future__ import annotations

import time

from tritonhybrid.stats import LatencyReport, RolloutStats


class LatencyClock:
    """Adds up a cycle's seconds as the engine is switched and called."""

    def __init__(self) -> None:
        self._cycle_start: float | None = None
        self._training_start: float | None = None
        self._gather_s = 0.0
        self._generate_s = 0.0
        self._training_s = 0.0
        self._samples: int | None = None
        self._cycles = 0
        self._total_s = 0.0

    def on_eval(self) -> LatencyReport | None:
        """Close the running cycle and start the next; None at the first call."""
        now = time.perf_counter()
        report = None
        if self._cycle_start is not None:
            seconds = now - self._cycle_start
            self._cycles += 1
            self._total_s += seconds
            report = LatencyReport(
                e2e_s=seconds,
                gather_s=self._gather_s,
                generate_s=self._generate_s,
                training_s=self._training_s,
                samples=self._samples,
                mean_e2e_s=self._total_s / self._cycles,
            )
        self._cycle_start = now
        self._gather_s = self._generate_s = self._training_s = 0.0
        return report

    def on_train(self) -> None:
        """Training begins."""
        self._training_start = time.perf_counter()

    def on_step(self) -> None:
        """An optimizer step ended."""
        now = time.perf_counter()
        if self._training_start is not None:
            self._training_s += now - self._training_start
            self._training_start = now

    def on_call(self, stats: RolloutStats, samples: int) -> None:
        """A rollout or generate call ended; ``samples`` counts all ranks' sequences."""
        self._gather_s += stats.gather_s
        self._generate_s += stats.total_s - stats.gather_s
        if self._samples is None:
            self._samples = samples
