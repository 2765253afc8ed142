"""TRL's own GRPOTrainer trains on what an attached engine samples."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run_ranks(stage: int, world_size: int, directory: Path) -> list[dict]:
    """What each rank of ``grpo_run.py`` tells."""
    script = Path(__file__).with_name("grpo_run.py")
    ranks = []
    try:
        for rank in range(world_size):
            command = [sys.executable, str(script), str(stage), str(directory)]
            command += [str(rank), str(world_size)]
            # Files: a full pipe would hold the rank up.
            out, errors = (directory / f"{name}.{rank}" for name in ("out", "errors"))
            with out.open("w") as stdout, errors.open("w") as stderr:
                process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
            ranks.append((process, out, errors))
        told = []
        for process, out, errors in ranks:
            assert process.wait(120) == 0, errors.read_text()[-3000:]
            told.append(json.loads(out.read_text().splitlines()[-1]))
        return told
    finally:
        for process, *_ in ranks:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (3, 2)])
def test_grpo_samples_with_the_engine_and_its_logprobs_are_trls_own_pass(
    stage, world_size, tmp_path
):
    pytest.importorskip("trl", reason="needs TRL, an extra")
    told = run_ranks(stage, world_size, tmp_path)
    assert all("on_train_begin" in rank["early"] for rank in told)
    assert [len(rank["rounds"]) for rank in told] == [2] * world_size
    for answer in [answer for rank in told for answer in rank["rounds"]]:
        assert answer["path"] == "fused"
        assert answer["strategy"] == ("pinned" if stage == 3 else "resident")
        prompts, completions = answer["prompt_ids"], answer["completion_ids"]
        # Two prompts, each repeated for its four generations, which differ.
        assert [prompts.count(prompt) for prompt in prompts] == [4] * 8
        assert len({tuple(completion) for completion in completions[:4]}) > 1
        for completion, ours, trls in zip(
            completions, answer["logprobs"], answer["trl"], strict=True
        ):
            assert 1 not in completion[:-1]
            assert len(completion) == 8 or completion[-1] == 1
            assert ours == pytest.approx(trls, abs=2e-4)
