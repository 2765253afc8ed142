"""Set-up of the kernel tests: the device, the interpreter, and how results are compared.

These tests are their own pytest run (``pytest tests/kernels``). On a machine without a GPU every
kernel runs under Triton's interpreter, which must be chosen before triton is imported; with one
the same tests run compiled, on the device.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch

# TRITON_INTERPRET=1 on a machine with a GPU asks for the interpreter all the same.
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0"

if not ON_GPU:
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError(
            "tests/kernels needs TRITON_INTERPRET=1 before triton is imported, but triton was "
            "imported without it. Run these tests by themselves: pytest tests/kernels."
        )
    os.environ["TRITON_INTERPRET"] = "1"
    spec = importlib.util.spec_from_file_location(
        "interpret_bf16", Path(__file__).with_name("interpret_bf16.py")
    )
    assert spec is not None and spec.loader is not None
    interpret_bf16 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interpret_bf16)
    interpret_bf16.install()
    # A GPU overflows to inf and makes NaN in silence, as IEEE has it; the tests look at values.
    numpy.seterr(over="ignore", invalid="ignore", divide="ignore", under="ignore")

# Relative L2 error against fp64; kernels.md section 7.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

DTYPES = tuple(TOLERANCES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if ON_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The device the kernels run on in this process."""
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |actual - expected| / |expected| in fp64; NaN anywhere gives NaN."""
    expected = expected.double()
    scale = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual.double() - expected).norm() / scale)


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """Return a check of a kernel's result against fp64 and against torch's own op.

    ``check(actual, exact, torch_result)``: `exact` is the fp64 reference; `torch_result`, when
    given, is torch's op in the dtype of `actual`, whose error `actual` may at most double.
    """

    def check(
        actual: torch.Tensor, exact: torch.Tensor, torch_result: torch.Tensor | None = None
    ) -> None:
        assert actual.shape == exact.shape
        assert not actual.isnan().any(), "an element was not written (outputs are poisoned)"
        error = relative_l2(actual, exact)
        assert error <= TOLERANCES[actual.dtype], f"relative L2 error {error:.2e}"
        if torch_result is not None and actual.dtype != torch.float32:
            bound = 2 * relative_l2(torch_result, exact)
            assert error <= bound, f"error {error:.2e}, over twice torch's own: {bound:.2e}"

    return check


@pytest.fixture
def poisoned() -> Callable[..., torch.Tensor]:
    """Return a factory of tensors full of NaN, for ``out=``."""

    def make(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    return make


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank, once: DeepSpeed keeps groups that it made over the first."""
    from tritonhybrid.local_engine import choose_device, join_ranks, leave_ranks

    join_ranks(0, 1, choose_device("auto"), tmp_path_factory.mktemp("ranks") / "meeting")
    yield
    leave_ranks()
