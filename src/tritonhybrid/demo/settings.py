"""The demo's options and the constants of its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Options of a run and the constants of its recipe.

    Batch sizes are over all ranks, so one and two ranks learn from the same data.

    Args:
        zero: ZeRO stage, 0 to 3.
        ranks: Processes that train together, 1 or 2.
        device: "cpu" or "cuda".
        steps: GRPO steps.
        seed: Fixes weights, prompts and samples.
        out: Directory of ``metrics.json`` and ``reward.png``.
        trace: File of trace events, one a rank; None writes none.
        warm_up_steps: Imitation steps before GRPO.
        warm_up_batch: Demonstrations a warm-up step.
        warm_up_lr: Peak learning rate of warm-up; falls to a tenth.
        prompts_per_step: Prompts a GRPO step.
        samples_per_prompt: Completions a prompt.
        lr: Learning rate of GRPO's first step; falls to a tenth.
        held_out_prompts: Prompts of the measurements at start and end.
        held_out_samples: Sampled completions of each.
        comparison_rounds: Times that ours and HF's generate take turns.
    """

    zero: int = 3
    ranks: int = 1
    device: str = "cpu"
    steps: int = 60
    seed: int = 0
    out: Path = Path("runs/demo")
    trace: Path | None = None
    warm_up_steps: int = 400
    warm_up_batch: int = 64
    warm_up_lr: float = 1e-3
    prompts_per_step: int = 32
    samples_per_prompt: int = 8
    lr: float = 3e-4
    held_out_prompts: int = 128
    held_out_samples: int = 4
    comparison_rounds: int = 3
