"""The repository's shape: two source roots, no accidental packages, a wheel that holds both."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "tritonhybrid": ROOT / "src/tritonhybrid",
    "tritonhybrid_kernels": ROOT / "kernels/tritonhybrid_kernels",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = WheelBuilder(str(ROOT)).build(
        directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"]
    )
    return Path(path)


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def run_python(code: str, cwd: Path, *path: Path) -> str:
    entries = [str(entry) for entry in path]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {entries!r}\n{code}"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_kernels_root_holds_only_the_import_package():
    names = {path.name for path in (ROOT / "kernels").iterdir()} - {"__pycache__"}
    assert names == {"tritonhybrid_kernels"}


def test_tests_hold_no_packages():
    assert sorted((ROOT / "tests").rglob("__init__.py")) == []


def test_source_roots_do_not_answer_to_the_name_kernels(tmp_path: Path):
    """Transformers looks for Hugging Face's package of that name."""
    code = """
from importlib.util import find_spec
spec = find_spec("kernels")
print(None if spec is None else spec.origin)
"""
    origin = run_python(code, tmp_path, ROOT / "src", ROOT / "kernels")
    assert origin == "None" or not Path(origin).is_relative_to(ROOT)


def test_transformers_started_at_the_root_takes_no_directory_of_ours_for_kernels():
    code = """
from importlib.metadata import packages_distributions
from transformers.utils import is_kernels_available
print(is_kernels_available() == ("kernels" in packages_distributions()))
"""
    assert run_python(code, ROOT, ROOT, ROOT / "src", ROOT / "kernels") == "True"


def test_wheel_needs_no_compiler(wheel: Path):
    assert wheel.name == f"tritonhybrid-{PROJECT['version']}-py3-none-any.whl"


def test_wheel_holds_the_two_packages_and_nothing_else(wheel_files: list[str]):
    tops = {name.split("/")[0] for name in wheel_files}
    assert tops == {*PACKAGES, f"tritonhybrid-{PROJECT['version']}.dist-info"}


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_source_and_data_file(package: str, wheel_files: list[str]):
    directory = PACKAGES[package]
    expected = {
        f"{package}/{path.relative_to(directory).as_posix()}"
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert f"{package}/py.typed" in expected
    assert expected == {name for name in wheel_files if name.startswith(f"{package}/")}


def test_wheel_metadata_repeats_pyproject(metadata: Message):
    assert metadata["Name"] == "tritonhybrid"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()


def test_wheel_requires_the_proven_ranges_and_six_packages(metadata: Message):
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    ranges = {}
    for line in required:
        name = line.split(";")[0].split(">")[0].split("<")[0].strip()
        ranges[name] = set(line.split(";")[0].removeprefix(name).strip().split(","))
    assert set(ranges) == {"deepspeed", "matplotlib", "rich", "torch", "transformers", "triton"}
    assert ranges["torch"] == {">=2.11", "<2.14"}
    assert ranges["triton"] == {">=3.6", "<3.10"}
    assert ranges["transformers"] == {">=5.10.1", "<6"}
    assert ranges["deepspeed"] == {">=0.19.8", "<0.20"}


def test_wheel_installs_the_console_script(wheel: Path, wheel_files: list[str]):
    (name,) = [name for name in wheel_files if name.endswith(".dist-info/entry_points.txt")]
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(name).decode().split("\n")
    assert "tritonhybrid = tritonhybrid.cli:main" in lines


def is_triton_language(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_kernel_launchers_and_references_are_fully_annotated():
    """Mypy and ruff let the kernels' signatures be, and cannot tell them from the rest."""
    untyped = []
    for path in sorted(PACKAGES["tritonhybrid_kernels"].rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or is_triton_language(node):
                continue
            spec = node.args
            arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
            named = [a for a in arguments if a is not None and a.arg not in ("self", "cls")]
            if node.returns is None or any(argument.annotation is None for argument in named):
                untyped.append(f"{path.name}:{node.lineno} {node.name}")
    assert untyped == []
