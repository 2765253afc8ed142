"""Dependent launches, compiled: they wait once, in every program, before they read or write."""

from __future__ import annotations

import re

import pytest

from tritonhybrid_kernels.audit import compile_case, shipped_cases
from tritonhybrid_kernels.operand_reads import global_reads
from tritonhybrid_kernels.ops import OP_NAMES

# Ops with a launch in a decode step.
DECODE_OPS = [name for name in OP_NAMES if name != "attention_varlen"]

WAIT = "griddepcontrol.wait"
RELEASE = "griddepcontrol.launch_dependents"
WEIGHTS = {"weight_ptr", "w_ptr", "q_weight_ptr", "k_weight_ptr", "v_weight_ptr"}
WEIGHTS |= {"gate_weight_ptr", "up_weight_ptr"}


def one_a_kernel(cases):
    """The first case of each kernel, by its name."""
    first = {}
    for case in cases:
        first.setdefault(case.kernel.__name__, case)
    return first.values()


def dependent_ptx(op):
    cases = [case for case in shipped_cases(op, 90) if case.constants.get("PDL")]
    for case in one_a_kernel(cases):
        assert case.options["launch_pdl"] is True
        compiled = compile_case(case, 90)
        assert compiled.metadata.launch_pdl is True
        yield compiled.asm["ptx"], compiled.src.signature


@pytest.mark.parametrize("op", OP_NAMES)
def test_every_kernel_of_a_decode_step_has_a_dependent_launch_on_sm_90(op):
    cases = list(shipped_cases(op, 90))
    dependent = {case.kernel for case in cases if case.constants.get("PDL")}
    assert dependent == ({case.kernel for case in cases} if op in DECODE_OPS else set())


@pytest.mark.parametrize("op", DECODE_OPS)
def test_a_dependent_launch_waits_once_and_then_releases_the_next(op):
    for ptx, _ in dependent_ptx(op):
        assert ptx.count(WAIT) == ptx.count(RELEASE) == 1
        assert ptx.index(WAIT) < ptx.index(RELEASE)


@pytest.mark.parametrize("op", DECODE_OPS)
def test_before_the_wait_weights_are_read_and_nothing_is_written(op):
    for ptx, signature in dependent_ptx(op):
        before = ptx[: ptx.index(WAIT)]
        read = {name for read in global_reads(before, signature) for name in read.operands}
        assert read <= WEIGHTS
        assert not re.search(r"\b(st|red|atom)\.(\w+\.)*global|cp\.async", before)


@pytest.mark.parametrize("op", DECODE_OPS)
def test_no_program_ends_or_turns_off_before_the_wait(op):
    for ptx, _ in dependent_ptx(op):
        before = ptx[: ptx.index(WAIT)]
        assert "ret;" not in before
        labels = set(re.findall(r"^(\$\w+):", before, re.MULTILINE))
        assert set(re.findall(r"\bbra(?:\.uni)?\s+(\$\w+);", before)) <= labels


@pytest.mark.parametrize("op", ["linear", "qkv_linear", "gate_up_silu", "lm_head_sample"])
def test_weights_are_asked_for_before_the_wait(op):
    ptx, _ = next(iter(dependent_ptx(op)))
    asked = [match.start() for match in re.finditer(r"prefetch\.global\.L2", ptx)]
    # 512 lines of 128 bytes, for 128 threads.
    assert len(asked) == 4
    assert max(asked) < ptx.index(WAIT)


@pytest.mark.parametrize("op", DECODE_OPS)
def test_an_independent_launch_has_no_trace_of_it(op):
    for arch in (80, 90):
        cases = [case for case in shipped_cases(op, arch) if not case.constants["PDL"]]
        assert arch == 90 or len(cases) == len(list(shipped_cases(op, arch)))
        for case in one_a_kernel(cases):
            assert "launch_pdl" not in case.options
            ptx = compile_case(case, arch).asm["ptx"]
            assert "griddepcontrol" not in ptx and "prefetch" not in ptx
