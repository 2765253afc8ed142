"""The arrows between rooms that import-linter cannot draw; its contracts are in pyproject.toml."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src/tritonhybrid"
KERNELS = ROOT / "kernels/tritonhybrid_kernels"

PLAIN_ROOMS = (
    "block_manager",
    "call_observer",
    "call_trace",
    "config",
    "errors",
    "long_rope",
    "noise",
    "rollout_output",
    "sampling_params",
    "scheduler",
    "sequence",
    "stats",
)


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """Yield every module that is imported and every dotted name that is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def is_zero(name: str) -> bool:
    return name.startswith(("deepspeed.zero.", "deepspeed.runtime.zero.")) or name in (
        "deepspeed.zero",
        "deepspeed.runtime.zero",
    )


@pytest.mark.parametrize(
    "line",
    [
        "import deepspeed.zero",
        "from deepspeed import zero",
        "from deepspeed.zero import GatheredParameters",
        "from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus",
        "deepspeed.zero.GatheredParameters([])",
    ],
)
def test_the_zero_rule_sees_each_way_to_reach_zero(line: str):
    assert any(is_zero(name) for name in dotted_names(ast.parse(line)))


def test_only_weights_touches_deepspeed_zero():
    users = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if any(is_zero(name) for name in dotted_names(ast.parse(path.read_text())))
    }
    assert users, "the rule guards nothing: no module reaches deepspeed.zero"
    assert {user for user in users if not user.startswith("weights/")} == set()


def test_nothing_imports_tests_or_bench():
    benchmarks = {path.stem for path in (ROOT / "bench").glob("*.py")}
    for path in [*SOURCES.rglob("*.py"), *KERNELS.rglob("*.py")]:
        tops = {name.split(".")[0] for name in imported_modules(ast.parse(path.read_text()))}
        assert tops.isdisjoint({"bench", "pytest", "tests", *benchmarks}), path


def test_scheduling_rooms_import_without_torch():
    code = f"""
import importlib, json, sys
for room in {PLAIN_ROOMS!r}:
    importlib.import_module("tritonhybrid." + room)
heavy = ("deepspeed", "numpy", "torch", "transformers", "triton")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []
