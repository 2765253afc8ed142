"""What a demo run measured, as it goes and at the end."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tritonhybrid.demo.grpo import Drift
from tritonhybrid.hf_peer import Agreement, Speed

GOAL_START, GOAL_END = 0.45, 0.80


@dataclass(kw_only=True)
class StepRecord:
    """One GRPO step, over all ranks.

    Args:
        reward: Mean verified reward of the step's completions.
        loss: Mean loss of its updates.
        num_tokens: Completion tokens of the rollout.
        rollout_s: Seconds in ``engine.rollout``, gather included.
        gather_s: Seconds of it that brought ZeRO-3's partitioned weights together.
        training_s: Seconds in forward, backward and optimizer step.
    """

    reward: float
    loss: float
    num_tokens: int
    rollout_s: float
    gather_s: float
    training_s: float


@dataclass(kw_only=True)
class Comparison:
    """Our rollout beside HF's generate on the final weights and the same prompts.

    Args:
        greedy: Greedy tokens of both, position by position.
        ours: Tokens and seconds of ``engine.rollout``, ZeRO-3's gather included.
        theirs: Tokens and seconds of ``generate`` on a plain copy of the weights.
    """

    greedy: Agreement
    ours: Speed
    theirs: Speed


@dataclass(kw_only=True)
class DemoRecord:
    """Everything the demo reports; ``metrics.json`` is this object.

    Args:
        settings: The options of the run.
        state: "running", "interrupted", "failed" or "finished".
        start_up_s: Seconds from the process's first line to a wrapped engine.
        warm_up_s: Seconds of imitation before the reward is ever looked at.
        warm_up_losses: One per warm-up step.
        reward_start: Sampled reward on held-out prompts before GRPO.
        reward_end: The same after it.
        greedy_start: Greedy reward on held-out prompts before GRPO.
        greedy_end: The same after it.
        steps: One entry per GRPO step.
        drift: Rollout against training log-probabilities on equal weights.
        comparison: Beside HF's generate.
        rollout_stats: The engine's own account of its latest training rollout.
        total_s: Seconds of the whole run.
    """

    settings: dict[str, Any]
    state: str = "running"
    start_up_s: float = 0.0
    warm_up_s: float = 0.0
    warm_up_losses: list[float] = field(default_factory=list)
    reward_start: float | None = None
    reward_end: float | None = None
    greedy_start: float | None = None
    greedy_end: float | None = None
    steps: list[StepRecord] = field(default_factory=list)
    drift: Drift = field(default_factory=Drift)
    comparison: Comparison | None = None
    rollout_stats: dict[str, Any] = field(default_factory=dict)
    total_s: float = 0.0

    @property
    def is_goal_met(self) -> bool:
        """Whether the reward rose from at most 0.45 to at least 0.80."""
        if self.reward_start is None or self.reward_end is None:
            return False
        return self.reward_start <= GOAL_START and self.reward_end >= GOAL_END

    @property
    def is_greedy_equal(self) -> bool:
        """Whether every greedy token was HF's."""
        return self.comparison is not None and self.comparison.greedy.is_whole

    def seconds(self, part: str) -> float:
        """Sum one ``*_s`` field over the GRPO steps."""
        return float(sum(getattr(step, part) for step in self.steps))

    def as_json(self) -> dict[str, Any]:
        """Return plain values, derived ones included."""
        values = asdict(self)
        values["versions"] = {
            name: version(name) for name in ("torch", "transformers", "deepspeed")
        } | {"python": platform.python_version()}
        values["goal_met"] = self.is_goal_met
        values["seconds"] = {
            "start_up": self.start_up_s,
            "warm_up": self.warm_up_s,
            "rollout": self.seconds("rollout_s"),
            "training": self.seconds("training_s"),
            "gather": self.seconds("gather_s"),
            "total": self.total_s,
        }
        values["drift"] |= {"mean_abs": self.drift.mean_abs, "mean_k3": self.drift.mean_k3}
        if self.comparison is not None:
            for side in ("ours", "theirs"):
                speed: Speed = getattr(self.comparison, side)
                values["comparison"][side]["tokens_per_s"] = speed.tokens_per_s
        return values

    def write(self, path: Path) -> None:
        """Write the JSON whole or not at all: to a temporary name, then renamed."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(self.as_json(), indent=2) + "\n")
        scratch.replace(path)
