"""Every shipped launch, compiled for GPUs that are not here: no spills, right instructions.

Runs without TRITON_INTERPRET. Cases that differ only in sizes share one compiled kernel, so the
list may name many shapes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from tritonhybrid_kernels.audit import (
    SHARED_LIMIT_BYTES,
    audit_case,
    compile_case,
    inspect_kernel,
    shipped_cases,
)
from tritonhybrid_kernels.launch import LaunchCase, NarrowRead
from tritonhybrid_kernels.ops import OP_NAMES

ARCHS = tuple(SHARED_LIMIT_BYTES)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OP_NAMES)
def test_every_shipped_launch_may_ship(op, arch):
    cases = list(shipped_cases(op, arch))
    labels = [(case.op, case.label) for case in cases]
    assert len(labels) == len(set(labels)) > 0
    broken = {case.label: audit_case(case, arch)[1] for case in cases}
    assert {label: rules for label, rules in broken.items() if rules} == {}


@pytest.mark.parametrize("op", OP_NAMES)
def test_no_launch_is_exempt_without_a_reason(op):
    for arch in ARCHS:
        cases = list(shipped_cases(op, arch))
        assert any(case.streams for case in cases)
        for case in cases:
            assert case.streams or case.narrow
            assert all(len(read.reason.split()) > 3 for read in case.narrow.values())


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
        streams=("x_ptr",),
    )


@pytest.mark.parametrize(("arch", "mma"), [(80, "HMMA"), (90, "HGMMA")])
def test_a_sound_kernel_passes_with_the_instruction_of_its_architecture(arch, mma):
    report, broken = audit_case(probe(64, torch.bfloat16, 64, 4, mma), arch)
    assert broken == []
    assert report.mma == mma and report.num_mma > 0
    assert report.load_widths[128] == report.load_widths.total() > 0
    assert report.operand_widths == {"x_ptr": report.load_widths}
    assert report.registers <= 255 and report.num_warps == 4


@pytest.mark.parametrize("arch", ARCHS)
def test_the_gate_sees_narrow_loads(arch):
    report, broken = audit_case(probe(67, torch.bfloat16, 64, 4, "tensor_core"), arch)
    assert broken == [f"x_ptr is not read 128 bits at a time: {found(report, 'x_ptr')}"]


def found(report, name):
    return f"reads by width {dict(report.operand_widths[name])}"


@triton.jit
def _sum_kernel(absent_ptr, x_ptr, stride_x, y_ptr, stride_y, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + offs)
    y = tl.load(y_ptr + row * stride_y + offs)
    scale = tl.load(out_ptr + row)
    tl.store(out_ptr + row * BLOCK + offs, (x + y) * scale)


def two_operands(stride_x: int, stride_y: int) -> LaunchCase:
    return LaunchCase(
        op="probe",
        label="probe",
        kernel=_sum_kernel,
        args=(None, torch.float32, stride_x, torch.float32, stride_y, torch.float32),
        constants={"BLOCK": 1024},
        options={"num_warps": 4},
        mma="none",
        streams=("x_ptr", "y_ptr"),
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("strides", "narrow"),
    [((1024, 1024), None), ((1024, 1025), "y_ptr"), ((1, 1024), "x_ptr"), ((1024, 1), "y_ptr")],
)
def test_the_gate_names_one_operand_read_directly_that_is_narrow(arch, strides, narrow):
    """An absent pointer and a stride of 1 are compiled in and shift the numbers of the others."""
    report, broken = audit_case(two_operands(*strides), arch)
    assert [rule.split()[0] for rule in broken] == ([] if narrow is None else [narrow])
    assert set(report.operand_widths) == {"x_ptr", "y_ptr"}


def test_the_gate_refuses_an_operand_without_a_name():
    case = replace(two_operands(1024, 1025), streams=("x_ptr",))
    _, broken = audit_case(case, 90)
    assert broken == ["y_ptr is read, but named neither as a stream nor as a narrow read"]


def test_the_gate_takes_a_narrow_read_with_its_width_and_reason_and_no_narrower_one():
    reads = {bits: {"y_ptr": NarrowRead(bits, "rows of 1025 numbers")} for bits in (32, 64)}
    case = replace(two_operands(1024, 1025), streams=("x_ptr",))
    assert audit_case(replace(case, narrow=reads[32]), 90)[1] == []
    report, broken = audit_case(replace(case, narrow=reads[64]), 90)
    assert broken == [f"y_ptr is not read 64 bits at a time: {found(report, 'y_ptr')}"]


def test_the_gate_refuses_names_that_no_longer_hold():
    wide = {"y_ptr": NarrowRead(32, "it was so once")}
    case = replace(two_operands(1024, 1024), streams=("x_ptr", "z_ptr"), narrow=wide)
    _, broken = audit_case(case, 90)
    assert broken == [
        "z_ptr is named as a stream, but not read",
        "y_ptr is named as a narrow read (it was so once), but is a stream",
    ]


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


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stride", [512, 514, 513])
def test_the_gate_names_the_one_pipelined_operand_that_is_narrow(arch, dtype, stride):
    case = LaunchCase(
        op="probe",
        label="probe",
        kernel=_pipelined_kernel,
        args=(dtype, dtype, torch.float32, 512, stride),
        constants={"BLOCK": 64},
        options={"num_warps": 4, "num_stages": 3},
        mma="tensor_core",
        streams=("x_ptr", "w_ptr"),
    )
    report, broken = audit_case(case, arch)
    narrow = [] if stride == 512 else ["w_ptr"]
    assert [rule.split()[0] for rule in broken] == narrow
    assert set(report.operand_widths["x_ptr"]) == {128}
    assert report.async_widths[128] > 0


@triton.jit
def _selecting_kernel(a_ptr, b_ptr, table_ptr, y_ptr, stride_a, stride_b, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        x_ptr = a_ptr
        stride = stride_a
    else:
        x_ptr = b_ptr
        stride = stride_b
    row = tl.load(table_ptr + tl.program_id(1))
    tl.store(y_ptr + offs, tl.load(x_ptr + row * stride + offs))


@pytest.mark.parametrize(("stride_b", "is_wide"), [(1024, True), (1025, False)])
def test_a_read_that_selects_counts_for_each_operand_and_not_for_the_table(stride_b, is_wide):
    case = LaunchCase(
        op="probe",
        label="probe",
        kernel=_selecting_kernel,
        args=(torch.float32, torch.float32, torch.int64, torch.float32, 1024, stride_b),
        constants={"BLOCK": 1024},
        options={"num_warps": 4},
        mma="none",
        streams=("a_ptr", "b_ptr"),
    )
    report, broken = audit_case(case, 90)
    assert [rule.split()[0] for rule in broken] == ([] if is_wide else ["a_ptr", "b_ptr"])
    assert set(report.operand_widths) == {"a_ptr", "b_ptr"}


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
