"""``tritonhybrid doctor``: what is installed, what would run here, and what was never tried."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tritonhybrid.local_engine import choose_device

REQUIRED = ("torch", "triton", "transformers", "deepspeed", "rich", "matplotlib")
OPTIONAL = ("gguf", "peft", "accelerate", "trl")
IMPORTED = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "tritonhybrid_kernels.ops",
    "tritonhybrid.engine",
)
COMPILERS = ("cc", "gcc", "clang")


@dataclass(kw_only=True)
class Findings:
    """What the examination has come to.

    Args:
        lines: To print, in order.
        problems: What breaks the installation; none means healthy.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self, subject: str, text: str) -> None:
        """Add one line."""
        self.lines.append(f"{subject:<14} {text}")

    def fail(self, subject: str, text: str) -> None:
        """Add one line that is also a problem."""
        self.say(subject, f"PROBLEM: {text}")
        self.problems.append(f"{subject}: {text}")


def add_parser(commands: Any) -> None:
    """Add the command and its options.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "doctor",
        help="check the installation and say what would run how on this machine",
        description="Exits with 1 when the installation is broken.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR_OR_GGUF",
        help="also say which of its layers would run fused, generic or in HF's own loop",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine and print.

    Args:
        options: What :func:`add_parser` defined.

    Returns:
        Exit code: 0, or 1 when the installation is broken.

    Raises:
        ConfigError: ``--model`` can't be read.
        UnsupportedModelError: It is no causal language model.
    """
    findings = Findings()
    examine_versions(findings)
    examine_imports(findings)
    if not findings.problems:
        examine_device(findings)
    if options.model is not None and not findings.problems:
        examine_model(findings, options.model, trust_remote_code=options.trust_remote_code)
    for line in findings.lines:
        sys.stdout.write(line + "\n")
    if findings.problems:
        sys.stdout.write(f"\n{len(findings.problems)} problem(s); mend them and run again\n")
        return 1
    sys.stdout.write("\nhealthy\n")
    return 0


def examine_versions(findings: Findings) -> None:
    """Hold the installed versions against the ranges of this package's own metadata."""
    findings.say("python", f"{platform.python_version()} on {platform.system()}")
    ranges = dict(_required_ranges())
    if not ranges:
        findings.say("tritonhybrid", "runs from a source tree: version ranges can't be checked")
    else:
        findings.say("tritonhybrid", metadata.version("tritonhybrid"))
    for name in REQUIRED:
        installed = _version(name)
        wanted = ranges.get(name)
        if installed is None:
            findings.fail(name, "not installed; pip install tritonhybrid brings it")
        elif wanted is not None and not wanted.contains(installed, prereleases=True):
            findings.fail(name, f"{installed} is outside {wanted}")
        else:
            findings.say(name, installed)
    for name in OPTIONAL:
        findings.say(name, _version(name) or "not installed (optional)")


def examine_imports(findings: Findings) -> None:
    """Import what every run imports; a failure is a problem with its own words.

    DeepSpeed is told the device first, as in every other command.
    """
    for name in IMPORTED:
        try:
            if name == "deepspeed":
                choose_device("auto")
            importlib.import_module(name)
        except Exception as error:
            findings.fail(name, f"import fails with {type(error).__name__}: {error}")
    if not findings.problems:
        findings.say("imports", "fine")


def examine_device(findings: Findings) -> None:
    """Say which backend would run here and why, and what was never tried on it."""
    import torch

    from tritonhybrid_kernels.launch import is_interpreted

    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        findings.say(
            "device", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        )
        findings.say("backend", "triton, because the model will be on a CUDA device")
        if compiler is None or shutil.which(compiler) is None:
            findings.fail(
                "compiler", "Triton needs a C compiler on CUDA and finds none; install gcc"
            )
        else:
            findings.say("compiler", f"{compiler} (Triton builds its launchers with it)")
        findings.say("untested", "no kernel, rollout or demo of this version has met a GPU yet")
        findings.say("", "run bench/gpu.sh from a checkout: it tests each op on this device")
        return
    findings.say("device", f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    if is_interpreted():
        findings.say("backend", "triton's interpreter, because TRITON_INTERPRET is set (very slow)")
    else:
        findings.say("backend", "torch, because there is no CUDA device")
    findings.say("compiler", f"{compiler or 'none'} (none is needed on the CPU)")
    findings.say(
        "untested",
        "the Triton kernels: on CPUs they run in Triton's interpreter only, and none has met "
        "a GPU yet; CUDA, several GPUs and nccl",
    )


def examine_model(findings: Findings, path: Path, *, trust_remote_code: bool) -> None:
    """Say how each layer of a model on disk would be served, weights unread.

    Args:
        findings: Filled.
        path: A Hugging Face model directory or a GGUF file.
        trust_remote_code: Run the Python code that the directory brings along.

    Raises:
        ConfigError: It can't be read.
        UnsupportedModelError: It is no causal language model.
    """
    from tritonhybrid.containers.plan import describe_model
    from tritonhybrid.local_engine import hush
    from tritonhybrid.model_files import ModelFiles

    hush()
    files = ModelFiles.find(path, trust_remote_code=trust_remote_code)
    model = files.build_empty()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    findings.say("model", f"{type(model).__name__}, {num_parameters / 1e6:,.1f} M parameters")
    runs: list[tuple[str, str, list[int]]] = []
    for plan in describe_model(model):
        if runs and runs[-1][:2] == (plan.path, plan.reason):
            runs[-1][2].append(plan.layer)
        else:
            runs.append((plan.path, plan.reason, [plan.layer]))
    for route, reason, layers in runs:
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        findings.say(span, f"{route}: {reason}")
    findings.say(
        "", "the first rollout compares them with HF's forward and may choose a safer path"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required_ranges() -> Iterator[tuple[str, Any]]:
    # A dependency of transformers and deepspeed alike, so it is there when they are.
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("tritonhybrid") or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        if "extra" not in str(requirement.marker or ""):
            yield requirement.name, requirement.specifier
