"""Without the interpreter a launcher refuses CPU tensors and says what to call instead."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels import launch
from tritonhybrid_kernels.add_rms_norm import add_rms_norm
from tritonhybrid_kernels.errors import KernelArgumentError, TritonHybridError
from tritonhybrid_kernels.gate_up_silu import gate_up_silu
from tritonhybrid_kernels.launch import decode_options, is_interpreted, launch_options
from tritonhybrid_kernels.linear import linear
from tritonhybrid_kernels.qkv_linear import qkv_linear

X = torch.zeros(2, 8)
W = torch.zeros(4, 8)


def test_this_process_compiles():
    assert not is_interpreted()


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (add_rms_norm, (X, torch.zeros(8), 1e-5)),
        (linear, (X, W)),
        (qkv_linear, (X, W, W, W)),
        (gate_up_silu, (X, W, W)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_launcher_refuses_cpu_tensors_and_names_the_torch_path(op, arguments):
    with pytest.raises(KernelArgumentError, match=f"{op.__name__}: .* cuda, got cpu") as caught:
        op(*arguments)
    assert f"{op.__name__}_ref" in str(caught.value)
    assert isinstance(caught.value, TritonHybridError) and isinstance(caught.value, ValueError)


def test_fp_fusion_is_off_wherever_the_compiler_runs():
    assert launch_options(torch.device("cuda", 0)) == {"enable_fp_fusion": False}
    assert decode_options(torch.device("cuda", 0))["enable_fp_fusion"] is False


@pytest.mark.parametrize(
    ("is_on", "arch", "hip", "expected"),
    [
        (False, 90, None, {"PDL": False}),
        (True, 80, None, {"PDL": False}),
        (True, 94, "7.0", {"PDL": False}),
        (True, 90, None, {"PDL": True, "launch_pdl": True}),
        (True, 100, None, {"PDL": True, "launch_pdl": True}),
    ],
)
def test_dependent_launch_needs_its_switch_and_a_device_that_has_it(
    monkeypatch, is_on, arch, hip, expected
):
    monkeypatch.setattr(launch, "DEPENDENT_LAUNCH", is_on)
    monkeypatch.setattr(launch, "_cuda_arch", lambda index: arch)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert decode_options(torch.device("cuda", 0)) == {"enable_fp_fusion": False, **expected}


def test_dependent_launch_is_off_until_a_gpu_has_run_it():
    assert launch.DEPENDENT_LAUNCH is False
