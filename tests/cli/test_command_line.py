import json
import subprocess
import sys
from pathlib import Path

import pytest

from tritonhybrid.cli import main, parse
from tritonhybrid.demo.settings import DemoSettings


def test_the_front_door_opens_without_heavy_imports():
    code = """
import json, sys
from tritonhybrid.cli import parse
parse(["demo"])
heavy = ("deepspeed", "matplotlib", "numpy", "rich", "torch", "transformers", "triton")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


def test_the_module_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "tritonhybrid", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("demo", "generate", "doctor"))


def test_the_demo_defaults_to_zero_3_on_one_rank():
    options = parse(["demo"])
    assert (options.zero, options.ranks, options.device) == (3, 1, "auto")
    assert (options.steps, options.out) == (DemoSettings.steps, Path("runs/demo"))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["demo", "--zero", "4"],
        ["demo", "--ranks", "3"],
        ["demo", "--device", "tpu"],
        ["generate", "--model", "x"],
        ["generate", "--prompt", "x"],
        ["generate", "--model", "x", "--prompt", "y", "--dtype", "int8"],
        ["sing"],
    ],
)
def test_a_mistyped_command_line_exits_with_2(words: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    assert "usage: tritonhybrid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["demo", "--device", "cpu", "--steps", "0"], "at least one GRPO step"),
        (["demo", "--device", "cpu", "--out", __file__], "--out is a directory"),
        (["demo", "--device", "cpu", "--out", f"{__file__}/below"], "--out is a directory"),
        (["generate", "--model", "/nowhere", "--prompt", "x", "--n", "0"], "SamplingParams.n "),
        (
            ["generate", "--model", "/nowhere", "--prompt", "x", "--temperature", "-1"],
            "SamplingParams.temperature",
        ),
        (["generate", "--model", "/nowhere", "--prompt", "x", "--device", "cpu"], "/nowhere"),
        (["demo", "--device", "cpu", "--trace", "/nowhere/calls.json"], "no directory /nowhere"),
        (
            ["generate", "--model", "/nowhere", "--prompt", "x", "--trace", "/tmp"],
            "the directory /tmp",
        ),
        (["doctor", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture
):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "expected" in error and "got" in error
    assert "Traceback" not in error


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupted(findings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tritonhybrid.commands.doctor.examine_versions", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "tritonhybrid: interrupted\n"
