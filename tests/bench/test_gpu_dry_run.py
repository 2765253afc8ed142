"""``bench/gpu.sh --device cpu --tiny``: every part writes its JSON, parsed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), "--device", "cpu", "--tiny"],
        env={**os.environ, "OUT": str(out), "PATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.timeout(240)
def test_every_part_ends_well_and_names_its_command_and_versions(results):
    parts = results["gpu"]["parts"]
    assert list(parts) == ["op_tests", "ops", "e2e"]
    assert all(part["exit"] == 0 for part in parts.values()), parts
    for name in parts:
        assert results[name]["environment"]["transformers"]
        assert name in results[name]["command"]


def test_op_tests_ran_and_none_went_to_torch(results):
    ops = results["op_tests"]["ops"]
    assert ops and all(op["status"] == "passed" and op["passed"] for op in ops.values()), ops
    assert results["op_tests"]["torch_ops"] == []


def test_every_op_has_figures_and_no_percentage_of_a_gpu_it_never_met(results):
    from tritonhybrid_kernels.ops import OP_NAMES

    figures = results["ops"]["figures"]
    assert {figure["op"] for figure in figures} == set(OP_NAMES)
    for figure in figures:
        assert "error" not in figure, figure
        assert 0 < figure["us_p20"] <= figure["us_p50"] <= figure["us_p80"]
        assert figure["gb_per_s"] > 0 and figure["tflop_per_s"] > 0
        assert figure["percent_of_ceiling"] is None


def test_models_are_gated_and_each_row_names_its_backend_compile_and_graph(results):
    (model,) = results["e2e"]["models"].values()
    assert model["gate"]["tritonhybrid"] == "agrees"
    assert model["broken"] == []
    timed = [row for row in model["rows"] if "error" not in row]
    assert {row["provider"] for row in timed} >= {
        "tritonhybrid",
        "hf_generate",
        "hf_static_compile",
        "deepspeed_rollout",
    }
    for row in timed:
        assert row["attention"] and row["compile"] and row["graph"]
        assert row["phase"] in ("prefill", "decode_step")
    # DeepSpeed's graph capture has nothing to capture on a CPU: named, not left out.
    (graph, _) = [row for row in model["rows"] if row["provider"] == "deepspeed_rollout_graph"]
    assert graph["error"].startswith("failed: ")
