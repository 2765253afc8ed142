"""What a rank waits for the others, and what of a call each rank shows and records."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import hybrid_engine, ragged_prompts
from rich.console import Console

from tritonhybrid import SamplingParams, progress_bar
from tritonhybrid.runner import Runner

GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)
PROMPTS = ragged_prompts(4)
NAP_S = 0.5


def rank() -> int:
    return torch.distributed.get_rank()


def rank_1_naps_in_its_third_step(stage: int, directory: str) -> dict[str, Any]:
    engine = hybrid_engine(stage)
    engine.rollout(PROMPTS, GREEDY)
    # Both begin the call at once.
    torch.distributed.barrier()
    execute, steps = Runner.execute, []

    def napping(self: Runner, step: Any) -> Any:
        steps.append(step)
        if len(steps) == 3 and rank() == 1:
            time.sleep(NAP_S)
        return execute(self, step)

    screen = io.StringIO()
    original = progress_bar.ProgressBar
    progress_bar.ProgressBar = lambda: original(Console(file=screen))
    Runner.execute = napping
    try:
        with engine.trace(Path(directory) / "calls.json"):
            stats = engine.rollout(PROMPTS, GREEDY, progress=True).stats
    finally:
        Runner.execute = execute
        progress_bar.ProgressBar = original
    return {"stats": stats, "screen": screen.getvalue()}


@pytest.mark.parametrize("stage", [0, 3])
def test_the_quick_rank_waits_for_the_slow_one_under_zero_3_only(ranks, tmp_path: Path, stage: int):
    quick, slow = ranks(2).run(rank_1_naps_in_its_third_step, stage, str(tmp_path))
    if stage == 0:
        assert quick["stats"].sync_s == slow["stats"].sync_s == 0.0
    else:
        assert 0.8 * NAP_S < quick["stats"].sync_s < quick["stats"].total_s
        assert slow["stats"].sync_s < 0.5 * NAP_S
        assert slow["stats"].decode_s + slow["stats"].prefill_s > NAP_S
    assert quick["screen"].startswith("rollout 4/4 ")
    assert slow["screen"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calls.rank0.json", "calls.rank1.json",
    ]  # fmt: skip
    for index, result in enumerate((quick, slow)):
        events = json.loads((tmp_path / f"calls.rank{index}.json").read_text())["traceEvents"]
        assert {event["pid"] for event in events} == {index}
        waits = [event["dur"] for event in events if event["name"] == "meet"]
        gathers = [event["dur"] for event in events if event["name"] == "gather"]
        # Before the first gather, after the last and at the end.
        assert len(waits) == (3 if stage == 3 else 0)
        assert len(gathers) == (1 if stage == 3 else 0)
        assert sum(waits) / 1e6 == pytest.approx(result["stats"].sync_s, abs=1e-5)
        assert sum(gathers) / 1e6 == pytest.approx(result["stats"].gather_s, abs=1e-5)
