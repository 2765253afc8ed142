"""Every shipped launch, compiled for GPUs that are not here: no spills, right instructions.

Runs without TRITON_INTERPRET. Cases that differ only in sizes share one compiled kernel, so the
list may name many shapes.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl

from tritonhybrid_kernels.audit import SHARED_LIMIT_BYTES, audit_case, compile_case, inspect_kernel
from tritonhybrid_kernels.launch import LaunchCase
from tritonhybrid_kernels.ops import OP_NAMES

ARCHS = tuple(SHARED_LIMIT_BYTES)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OP_NAMES)
def test_every_shipped_launch_may_ship(op, arch):
    cases = list(import_module(f"tritonhybrid_kernels.{op}").audit_cases(arch))
    labels = [(case.op, case.label) for case in cases]
    assert len(labels) == len(set(labels)) > 0
    broken = {case.label: audit_case(case, arch)[1] for case in cases}
    assert {label: rules for label, rules in broken.items() if rules} == {}


@triton.jit
def _probe_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * size + offs[None, :])
    tl.store(y_ptr + offs[:, None] * size + offs[None, :], tl.dot(x, x.trans()))


def probe(size: int, dtype: torch.dtype, block: int, num_warps: int, mma: str) -> LaunchCase:
    return LaunchCase(
        op="probe",
        label="probe",
        kernel=_probe_kernel,
        args=(dtype, torch.float32, size),
        constants={"BLOCK": block},
        options={"num_warps": num_warps},
        mma=mma,
        streams=True,
    )


@pytest.mark.parametrize(("arch", "mma"), [(80, "HMMA"), (90, "HGMMA")])
def test_a_sound_kernel_passes_with_the_instruction_of_its_architecture(arch, mma):
    report, broken = audit_case(probe(64, torch.bfloat16, 64, 4, mma), arch)
    assert broken == []
    assert report.mma == mma and report.num_mma > 0
    assert report.load_widths[128] == report.load_widths.total() > 0
    assert report.registers <= 255 and report.num_warps == 4


def test_the_gate_sees_narrow_loads():
    _, broken = audit_case(probe(67, torch.bfloat16, 64, 4, "HMMA"), 80)
    assert len(broken) == 1 and "not read 128 bits at a time" in broken[0]


@triton.jit
def _pipelined_kernel(x_ptr, w_ptr, y_ptr, depth, stride_w, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + offs[:, None] * depth + offs[None, :]
    w_ptrs = w_ptr + offs[None, :] * stride_w + offs[:, None]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, depth, BLOCK):
        acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc)
        x_ptrs += BLOCK
        w_ptrs += BLOCK
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@pytest.mark.parametrize(("stride", "num_broken"), [(512, 0), (514, 1), (513, 1)])
def test_the_gate_sees_one_narrow_operand_beside_a_wide_one(stride, num_broken):
    case = LaunchCase(
        op="probe",
        label="probe",
        kernel=_pipelined_kernel,
        args=(torch.bfloat16, torch.bfloat16, torch.float32, 512, stride),
        constants={"BLOCK": 64},
        options={"num_warps": 4, "num_stages": 3},
        mma="HMMA",
        streams=True,
    )
    report, broken = audit_case(case, 80)
    assert len(broken) == num_broken
    assert report.async_widths[128] > 0


def test_the_gate_sees_spills():
    case = probe(64, torch.bfloat16, 64, 4, "HMMA")
    starved = replace(case, options={"num_warps": 4, "maxnreg": 32})
    _, broken = audit_case(starved, 80)
    assert any("spill instructions" in rule for rule in broken)


def test_the_gate_sees_the_wrong_instruction():
    _, broken = audit_case(probe(64, torch.bfloat16, 64, 4, "none"), 80)
    assert broken == ["matrix instruction HMMA, expected none"]


def test_a_launch_is_specialised_as_at_run_time():
    aligned = inspect_kernel(compile_case(probe(64, torch.bfloat16, 64, 4, "HMMA"), 80))
    ragged = inspect_kernel(compile_case(probe(67, torch.bfloat16, 64, 4, "HMMA"), 80))
    assert aligned.load_widths[128] and not ragged.load_widths[128]
