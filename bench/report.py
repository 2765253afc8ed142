"""What a bench leaves behind: one CSV of figures, and a JSON with the command that made them."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from timing import Spread

ROOT = Path(__file__).resolve().parent.parent

COLUMNS = (
    "commit",
    "device",
    "torch",
    "triton",
    "deepspeed",
    "transformers",
    "workload",
    "provider",
    "metric",
    "unit",
    "p20",
    "p50",
    "p80",
)


@dataclass(frozen=True)
class Row:
    """One figure, or one failure: then `metric` says what happened and the figures are empty."""

    workload: str
    provider: str
    metric: str
    unit: str = ""
    figures: Spread | None = None


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def commit() -> str:
    """Return the commit measured, marked ``-dirty`` where tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        name = git("rev-parse", "--short", "HEAD")
        return name + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


@cache
def environment(device: str) -> dict[str, str]:
    """Return the columns that are the same for every row of a run."""
    return {
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "deepspeed": installed("deepspeed"),
        "transformers": installed("transformers"),
    }


def command() -> str:
    """Return the command line of this process: a figure without it is not a figure."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def write_csv(path: Path, rows: Iterable[Row], device: str) -> None:
    """Write all rows of a run, replacing the file only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            figures = asdict(row.figures) if row.figures else {"p20": "", "p50": "", "p80": ""}
            cells = {key: f"{value:.6g}" if value != "" else "" for key, value in figures.items()}
            writer.writerow(
                environment(device)
                | {"workload": row.workload, "provider": row.provider}
                | {"metric": row.metric, "unit": row.unit}
                | cells
            )
    partial.replace(path)


def write_json(path: Path, content: dict[str, Any], device: str) -> None:
    """Write one part's results beside its environment and command, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    document = {"command": command(), "environment": environment(device), **content}
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def table(rows: Sequence[Row]) -> str:
    """Return rows as aligned text, for the terminal."""
    workloads = max((len(row.workload) for row in rows), default=0)
    providers = max((len(row.provider) for row in rows), default=0)
    lines = []
    for row in rows:
        figures = ""
        if row.figures:
            values = (row.figures.p50, row.figures.p20, row.figures.p80)
            figures = "{:>8.4g} [{:.4g}, {:.4g}] ".format(*values)
        head = f"{row.workload:<{workloads}}  {row.provider:<{providers}}  "
        lines.append(f"{head}{figures}{row.unit} {row.metric}")
    return "\n".join(lines)
