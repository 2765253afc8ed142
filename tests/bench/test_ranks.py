"""A contestant that takes its process down is named; the comparison goes on without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# A script of its own: the ranks import its functions by name, and pytest's modules have none.
SCRIPT = """
import json, os, signal, sys

sys.path.insert(0, sys.argv[1])
from comparison import Contestant, Field
from provider import Provider
from ranks import Job, compare_on_ranks
from workloads import WORKLOADS


def answer():
    return [[1, 2]]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def field_of(workload, dtype, rank):
    ways = {"reference": answer, "dies": die if rank == 1 else answer, "fine": answer}
    return Field(
        [
            Contestant(name, lambda name=name, run=run: Provider(name=name, run=run))
            for name, run in ways.items()
        ]
    )


if __name__ == "__main__":
    job = Job(
        field_of=field_of,
        workload=WORKLOADS["zero3_two_ranks"],
        dtype="fp32",
        rounds=2,
        device="cpu",
        threads=1,
    )
    outcome = compare_on_ranks(job, hang_s=100)
    counts = {name: len(values) for name, values in outcome.seconds.items()}
    print(json.dumps([outcome.names, outcome.failures, counts]))
"""


def test_a_rank_that_dies_costs_its_contestant_the_comparison_and_no_other(tmp_path):
    script = tmp_path / "field.py"
    script.write_text(SCRIPT)
    bench = Path(__file__).parents[2] / "bench"
    ended = subprocess.run(
        [sys.executable, str(script), str(bench)], capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    names, failures, rounds = json.loads(ended.stdout.splitlines()[-1])
    assert names == ["reference", "fine", "dies"]
    assert failures == {"dies": "failed: rank 1 died with exit code -9"}
    assert rounds == {"reference": 2, "fine": 2}
