import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tritonhybrid.cli import main
from tritonhybrid.commands import doctor


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that other versions are installed; None is a package that is missing."""
    real = metadata.version

    def pretend(*requirements: str, **versions: str | None) -> None:
        def version(name: str) -> str:
            if name == "tritonhybrid":
                return "9.9"
            if name not in versions:
                return real(name)
            if versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "requires", lambda name: list(requirements))

    return pretend


def examined() -> doctor.Findings:
    findings = doctor.Findings()
    doctor.examine_versions(findings)
    return findings


def test_versions_inside_their_ranges_are_no_problem(install: Callable[..., None]):
    install("torch<2.14,>=2.11", "deepspeed<0.20,>=0.19.8", torch="2.13.0+cpu", deepspeed="0.19.9")
    findings = examined()
    assert findings.problems == []
    assert "torch          2.13.0+cpu" in findings.lines
    assert "tritonhybrid   9.9" in findings.lines


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        ({"torch": "2.10.1"}, "torch: 2.10.1 is outside <2.14,>=2.11"),
        ({"torch": "2.14.0"}, "torch: 2.14.0 is outside <2.14,>=2.11"),
        ({"deepspeed": None}, "deepspeed: not installed"),
    ],
)
def test_a_version_out_of_range_or_missing_is_a_problem(
    install: Callable[..., None], versions: dict[str, str | None], problem: str
):
    install("torch<2.14,>=2.11", 'torch<1; extra == "old"', **versions)
    findings = examined()
    assert [text.startswith(problem) for text in findings.problems] == [True]


def test_optional_packages_may_be_missing(install: Callable[..., None]):
    install(trl=None, peft=None)
    findings = examined()
    assert findings.problems == []
    assert "trl            not installed (optional)" in findings.lines


def test_an_import_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "IMPORTED", ("json", "tritonhybrid.no_such_room"))
    findings = doctor.Findings()
    doctor.examine_imports(findings)
    assert len(findings.problems) == 1
    assert (
        "tritonhybrid.no_such_room: import fails with ModuleNotFoundError" in (findings.problems[0])
    )


def test_a_broken_installation_exits_with_1(
    install: Callable[..., None], capsys: pytest.CaptureFixture
):
    install(deepspeed=None)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "PROBLEM: not installed" in shown
    assert "1 problem(s)" in shown


def device_lines(monkeypatch: pytest.MonkeyPatch, *, has_cuda: bool, compiler: str | None) -> str:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == compiler else None)
    findings = doctor.Findings()
    doctor.examine_device(findings)
    return "\n".join(findings.lines + findings.problems)


def test_on_a_cpu_the_backend_is_torch_and_no_compiler_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tritonhybrid_kernels.launch.is_interpreted", lambda: False)
    shown = device_lines(monkeypatch, has_cuda=False, compiler=None)
    assert "torch, because there is no CUDA device" in shown
    assert "none (none is needed on the CPU)" in shown
    assert "none has met a GPU yet" in shown
    assert "PROBLEM" not in shown


def test_on_cuda_the_backend_is_triton_and_needs_a_compiler(monkeypatch: pytest.MonkeyPatch):
    shown = device_lines(monkeypatch, has_cuda=True, compiler="gcc")
    assert "H200, compute capability 9.0" in shown
    assert "triton, because the model will be on a CUDA device" in shown
    assert "gcc (Triton builds" in shown
    assert "PROBLEM" not in shown
    shown = device_lines(monkeypatch, has_cuda=True, compiler=None)
    assert "compiler: Triton needs a C compiler on CUDA and finds none" in shown


def test_a_model_is_told_layer_by_layer(model_dir: Path, capsys: pytest.CaptureFixture):
    assert main(["doctor", "--model", str(model_dir)]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM, 0.0 M parameters" in shown
    assert "layers 0-1     fused: " in shown
    assert shown.rstrip().endswith("healthy")
