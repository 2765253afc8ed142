"""The demo's loop from start to end, few steps: what it learns is for the demo itself."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from tritonhybrid.demo.launch import launch
from tritonhybrid.demo.settings import DemoSettings
from tritonhybrid.local_engine import choose_device

if __name__ == "__main__":
    ranks, warm_up_steps, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    settings = DemoSettings(
        zero=3, ranks=ranks, device=choose_device("cpu"), steps=2, out=out,
        warm_up_steps=warm_up_steps, warm_up_batch=8, prompts_per_step=4, samples_per_prompt=4,
        held_out_prompts=8, held_out_samples=2, comparison_rounds=1, trace=Path("calls.json"),
    )
    sys.exit(launch(settings, time.time()))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[[int, int], subprocess.Popen[str]]:
    """Start a small demo in a process group of its own, as a terminal would."""
    (tmp_path / "small_demo.py").write_text(PROGRAM)

    def run(ranks: int, warm_up_steps: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "small_demo.py", str(ranks), str(warm_up_steps), "out"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    return run


def metrics_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/metrics.json").read_text())


def traced(path: Path) -> list[str]:
    """Names of a whole trace's events."""
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"]]


def group_members(group: int) -> list[str]:
    """Command lines of the living processes of a process group."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                members.append((status.parent / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return members


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_trains_compares_and_reports(tmp_path: Path, start, ranks: int):
    process = start(ranks, 6)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    metrics = metrics_of(tmp_path)
    assert metrics["state"] == "finished"
    assert len(metrics["warm_up_losses"]) == 6
    assert metrics["warm_up_losses"][-1] < metrics["warm_up_losses"][0]
    assert len(metrics["steps"]) == 2
    assert metrics["comparison"]["greedy"]["num_equal"] > 0
    assert (
        metrics["comparison"]["greedy"]["num_equal"]
        == metrics["comparison"]["greedy"]["num_tokens"]
    )
    drift = metrics["drift"]
    assert drift["num_tokens"] == sum(step["num_tokens"] for step in metrics["steps"])
    assert drift["max_abs"] < 2e-4
    assert metrics["rollout_stats"]["strategy"] == "pinned"
    assert metrics["settings"]["ranks"] == ranks
    assert "greedy tokens equal to HF's" in out
    assert (tmp_path / "out/reward.png").read_bytes().startswith(b"\x89PNG")
    names = ["calls.json"] if ranks == 1 else ["calls.rank0.json", "calls.rank1.json"]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == names
    assert f"wrote {names[0]}" in out
    for name in names:
        # Four measurements, two steps, a check of greedy tokens and a round of the comparison.
        assert traced(tmp_path / name).count("rollout") == 4 + 2 + 1 + 1


@pytest.mark.parametrize(("ranks", "to_group"), [(1, True), (2, True), (2, False)])
def test_ctrl_c_leaves_no_process_and_what_was_written(
    tmp_path: Path, start, ranks: int, to_group: bool
):
    process = start(ranks, 100_000)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/metrics.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    # A terminal signals the whole group, `kill -INT` one process.
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted after 0 GRPO steps" in out
    deadline = time.monotonic() + 20
    while (left := group_members(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    metrics = metrics_of(tmp_path)
    assert metrics["state"] == "interrupted"
    assert len(metrics["warm_up_losses"]) >= 1
    name = "calls.json" if ranks == 1 else "calls.rank0.json"
    assert "process_name" in traced(tmp_path / name)
    assert (tmp_path / "out/reward.png").exists()
