import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tritonhybrid.demo.grpo import Drift
from tritonhybrid.demo.record import Comparison, DemoRecord, StepRecord
from tritonhybrid.demo.report import Report
from tritonhybrid.hf_peer import Agreement, Speed

SETTINGS = {"zero": 3, "ranks": 2, "device": "cpu"}


def step(reward: float) -> StepRecord:
    return StepRecord(
        reward=reward, loss=0.1, num_tokens=100, rollout_s=0.5, gather_s=0.125, training_s=0.25
    )


def finished(**changes: object) -> DemoRecord:
    record = DemoRecord(
        settings=SETTINGS,
        state="finished",
        reward_start=0.35,
        reward_end=0.85,
        steps=[step(0.4), step(0.8)],
        drift=Drift(num_tokens=4, sum_abs=2e-6, max_abs=1e-6, sum_k3=4e-9),
        comparison=Comparison(
            greedy=Agreement(num_equal=50, num_tokens=50),
            ours=Speed(num_tokens=300, seconds=2.0),
            theirs=Speed(num_tokens=300, seconds=3.0),
        ),
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def report_on(record: DemoRecord, out: Path, **console: object) -> tuple[Report, io.StringIO]:
    text = io.StringIO()
    return Report(record, out, Console(file=text, width=120, **console)), text


def test_a_finished_run_leaves_its_table_its_metrics_and_its_picture(tmp_path: Path):
    report, text = report_on(finished(), tmp_path / "new" / "out")
    report.finish()
    shown = " ".join(text.getvalue().split())
    for fact in (
        "0.350 -> 0.850",
        "from <= 0.45 to >= 0.80: met",
        "150 tokens/s",
        "100 tokens/s (rollout is 1.50x)",
        "100.0 % (50 of 50 tokens)",
        "mean 5.0e-07, max 1.0e-06 over 4 tokens",
        "k3-KL(rollout || training) │ 1.0e-09",
        "ZeRO-3, 2 rank(s), cpu",
    ):
        assert fact in shown
    metrics = json.loads((tmp_path / "new/out/metrics.json").read_text())
    assert metrics["seconds"]["rollout"] == 1.0
    assert metrics["seconds"]["gather"] == 0.25
    assert metrics["seconds"]["training"] == 0.5
    assert [entry["reward"] for entry in metrics["steps"]] == [0.4, 0.8]
    assert metrics["goal_met"] is True
    assert metrics["comparison"]["ours"]["tokens_per_s"] == 150.0
    picture = (tmp_path / "new/out/reward.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "new/out").iterdir()} == {
        "metrics.json",
        "reward.png",
    }


def test_an_interrupted_run_leaves_what_it_has(tmp_path: Path):
    record = DemoRecord(settings=SETTINGS, state="interrupted", warm_up_losses=[2.5])
    report, text = report_on(record, tmp_path)
    report.finish()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["state"] == "interrupted"
    assert metrics["warm_up_losses"] == [2.5]
    assert (metrics["reward_start"], metrics["comparison"]) == (None, None)
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert "goal" not in text.getvalue()


@pytest.mark.parametrize(
    ("start", "end", "is_met"),
    [(0.45, 0.80, True), (0.46, 0.9, False), (0.3, 0.79, False), (0.3, None, False)],
)
def test_the_goal_is_a_rise_from_below_to_above(start: float, end: float | None, is_met: bool):
    assert finished(reward_start=start, reward_end=end).is_goal_met is is_met


def test_without_a_terminal_progress_is_plain_lines_with_time_left(tmp_path: Path):
    report, text = report_on(finished(), tmp_path)
    with report.stage("GRPO", 3) as stage:
        for _ in range(3):
            stage.advance("reward 0.500")
    assert text.getvalue() == "GRPO 3/3 reward 0.500 0 s left\n"


def test_on_a_terminal_progress_is_a_bar_with_the_same_facts(tmp_path: Path):
    report, text = report_on(finished(), tmp_path, force_terminal=True)
    with report.stage("GRPO", 3) as stage:
        for _ in range(3):
            stage.advance("reward 0.500")
    assert "3/3" in text.getvalue()
    assert "reward 0.500" in text.getvalue()
    assert "left" in text.getvalue()


def test_progress_keeps_the_metrics_on_disk(tmp_path: Path):
    record = finished()
    report, _ = report_on(record, tmp_path)
    with report.stage("GRPO", 2) as stage:
        stage.advance("")
    assert len(json.loads((tmp_path / "metrics.json").read_text())["steps"]) == 2


def test_nearly_all_tokens_equal_never_reads_as_all():
    nearly = Agreement(num_equal=99_999, num_tokens=100_000)
    assert str(nearly) == "99.9 % (99,999 of 100,000 tokens)"
    assert not nearly.is_whole
    assert not Agreement(num_equal=0, num_tokens=0).is_whole
