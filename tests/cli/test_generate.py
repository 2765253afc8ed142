import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


def generate(model: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: DeepSpeed starts once in a process."""
    command = [sys.executable, "-m", "tritonhybrid", "generate", "--device", "cpu"]
    return subprocess.run(
        [*command, "--model", str(model), *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("zero", ["0", "3"])
def test_prompts_are_answered_n_times_and_greedy_tokens_are_hfs(
    model_dir: Path, tmp_path: Path, zero: str
):
    done = generate(
        model_dir, "--prompt", "w1 w2 w3", "--prompt", "w7", "--n", "3", "--zero", zero,
        "--max-new-tokens", "12", "--compare-hf", "--trace", str(tmp_path / "calls.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^>>> (.*)$", done.stdout, re.M) == ["w1 w2 w3", "w7"]
    assert re.findall(r"^\[(\d)\] ", done.stdout, re.M) == ["0", "1", "2"] * 2
    equal = re.search(r"greedy tokens equal to HF's: 100\.0 % \((\d+) of (\d+) ", done.stdout)
    assert equal is not None and equal[1] == equal[2]
    assert "in float32" in done.stdout
    assert f"weights {'pinned' if zero == '3' else 'resident'}" in done.stdout
    speeds = re.search(r"rollout ([\d.]+) tokens/s, HF generate ([\d.]+) tokens/s", done.stdout)
    assert speeds is not None and min(float(speeds[1]), float(speeds[2])) > 0
    events = json.loads((tmp_path / "calls.json").read_text())["traceEvents"]
    names = Counter(event["name"] for event in events)
    # The samples, the greedy tokens and three timed rounds of them.
    assert names["rollout"] == 5
    assert names["finish"] == 6 + 2 + 3 * 2
    assert names["gather"] == (5 if zero == "3" else 0)


def test_a_prompt_past_the_models_limit_is_refused_in_one_line(model_dir: Path):
    done = generate(model_dir, "--prompt", "w1", "--max-new-tokens", "64")
    assert done.returncode == 2
    assert done.stderr.startswith("tritonhybrid: ")
    assert "64" in done.stderr and "Traceback" not in done.stderr
