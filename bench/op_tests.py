"""Run every op's tests on the device, each file in its own process with a time limit.

    python bench/op_tests.py --device cuda --out bench/results/op_tests.json

Writes how each went, and ``torch_ops``: the ops not proven here, which the later parts run on
their torch path. Exit status 0 also when ops failed: the rest goes on without them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parts import run_child
from report import ROOT, write_json

TESTS = ROOT / "tests/kernels"

# Device functions shared by ops: when their own tests fail, no op that calls them is proven.
USED_BY = {"philox": ("sample_logits", "lm_head_sample")}


def run_file(path: Path, limit_s: float, extra: list[str]) -> dict[str, Any]:
    """Run one test file and return its counts, status and the first lines of its failures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        ended = run_child(
            [
                *(sys.executable, "-m", "pytest", str(path), "-q", "--import-mode=importlib"),
                *("-c", str(ROOT / "bench/pytest_device.ini"), "--rootdir", str(ROOT)),
                *("-p", "no:cacheprovider", "--junitxml", str(report), *extra),
            ],
            limit_s,
        )
        counts, failures = _read(report)
    if ended.timed_out:
        status = "timed out"
    elif ended.code not in (0, 1, 5):
        # pytest ends with 0, 1, or 5 where nothing matched; the rest is a signal or a broken run.
        status = f"crashed (exit {ended.code})"
    elif counts["failed"]:
        status = "failed"
    else:
        status = "passed" if counts["passed"] else "nothing ran"
    result = {"status": status, **counts, "seconds": round(ended.seconds, 1)}
    if status != "passed":
        result["failures"] = failures
        result["tail"] = ended.tail
    return result


def _read(report: Path) -> tuple[dict[str, int], list[str]]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[str] = []
    if not report.exists():
        return counts, failures
    for case in ElementTree.parse(report).iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if problem is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('name')}: {(problem.get('message') or '')[:200]}")
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failures[:10]


def unproven(results: dict[str, dict[str, Any]], ops: tuple[str, ...]) -> list[str]:
    """Return the ops whose tests, or those of what they call, did not pass."""
    failed = {name for name in results if results[name]["status"] != "passed"}
    failed |= {op for name in failed for op in USED_BY.get(name, ())}
    return sorted(failed & set(ops))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--only", nargs="*", default=None, help="ops to test; default all files")
    parser.add_argument("--limit-s", type=float, default=120.0, help="of one file")
    parser.add_argument("--budget-s", type=float, default=150.0, help="of all files together")
    parser.add_argument("--jobs", type=int, default=5, help="files at a time")
    parser.add_argument("--workers", type=int, default=1, help="processes a file, by pytest-xdist")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    from tritonhybrid_kernels.ops import OP_NAMES

    files = {path.stem.removeprefix("test_"): path for path in sorted(TESTS.glob("test_*.py"))}
    if arguments.only is not None:
        files = {name: path for name, path in files.items() if name in arguments.only}
    results: dict[str, dict[str, Any]] = {
        op: {"status": "no test file"}
        for op in OP_NAMES
        if op not in files and (arguments.only is None or op in arguments.only)
    }
    extra: list[str] = []
    if arguments.workers > 1:
        if find_spec("xdist") is None:
            print("pytest-xdist is absent: one process a file", flush=True)
        else:
            extra = ["-n", str(arguments.workers)]
    end = time.monotonic() + arguments.budget_s

    def test(name: str) -> None:
        left = end - time.monotonic()
        if left < 2:
            results[name] = {"status": "not run: time budget"}
        else:
            results[name] = run_file(files[name], min(arguments.limit_s, left), extra)
        switched = unproven(results, OP_NAMES)
        write_json(arguments.out, {"ops": dict(results), "torch_ops": switched}, arguments.device)
        print(f"{name}: {results[name]['status']}", flush=True)

    # Compiling takes most of the time, so files share the device; results need no quiet machine.
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(test, files))
    switched = unproven(results, OP_NAMES)
    write_json(arguments.out, {"ops": results, "torch_ops": switched}, arguments.device)
    print("torch path for:", ", ".join(switched) or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
