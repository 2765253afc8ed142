"""Reads of global memory in PTX, each with the operand its address derives from and its width."""

from __future__ import annotations

import pytest

from tritonhybrid_kernels.operand_reads import GlobalRead, global_reads

SIGNATURE = {
    "x_ptr": "*bf16",
    "absent_ptr": "constexpr",
    "stride": "constexpr",
    "size": "i32",
    "w_ptr": "*fp32",
    "BLOCK": "constexpr",
}

HEAD = """
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	.param .u32 _kernel_param_1,
	.param .u64 .ptr .global .align 1 _kernel_param_2,
	.param .u64 .ptr .global .align 1 _kernel_param_3
)
.reqntid 128
{
	.reg .b64 	%rd<9>;                     // registers ; of this kernel
$L__func_begin0:
	.loc	1 39 0                          // a.py:39:0
	ld.param.b64 	%rd1, [_kernel_param_0];
	ld.param.b32 	%r1, [_kernel_param_1];
	ld.param.b64 	%rd2, [_kernel_param_2];
	mov.u32 	%r2, %tid.x;
	mul.wide.u32 	%rd3, %r2, 16;
"""


def reads(body: str) -> list[GlobalRead]:
    return global_reads(
        HEAD + body + "\n\tret;\n}\n.section .debug { ld.global.b8 x, [%rd1]; }", SIGNATURE
    )


def read(*operands: str, bits: int, is_async: bool = False, is_uniform: bool = False) -> GlobalRead:
    return GlobalRead(frozenset(operands), bits, is_async, is_uniform)


def test_parameters_are_numbered_without_what_was_compiled_in():
    body = "add.s64 %rd4, %rd2, %rd3;\n ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd4 + 0 ];"
    assert reads(body) == [read("w_ptr", bits=128)]


@pytest.mark.parametrize(
    ("instruction", "bits"),
    [
        ("ld.global.b16 { %rs1 }, [ %rd4 + 0 ];", 16),
        ("@%p1 ld.global.v2.b32 { %r3, %r4 }, [ %rd4 + 64 ];", 64),
        ("@!%p1 ld.global.L1::evict_first.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd4 + 0 ];", 128),
        ("ld.global.L2::cache_hint.v2.b64 { %rd6, %rd7 }, [ %rd4 + 0 ], %rd8;", 128),
        ("ld.global.v8.b32 {%r3,%r4,%r5,%r6,%r7,%r8,%r9,%r10}, [%rd4];", 256),
        ("ld.acquire.gpu.global.b32 %r3, [%rd4];", 32),
        ("ld.b32 %r3, [%rd4];", 32),
        ("atom.global.add.u32 %r3, [%rd4], 1;", 32),
    ],
)
def test_width_is_vector_times_element(instruction, bits):
    assert reads(f"add.s64 %rd4, %rd1, %rd3;\n{instruction}") == [read("x_ptr", bits=bits)]


@pytest.mark.parametrize("size", ["16", "0x10"])
def test_asynchronous_copies_are_counted_by_their_bytes(size):
    body = f"""
	add.s64 %rd4, %rd1, %rd3;
	// begin inline asm
	@%p1 cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], {size}, %r6;
	// end inline asm
	cp.async.commit_group;
	cp.async.wait_group 	2;"""
    assert reads(body) == [read("x_ptr", bits=128, is_async=True)]


def test_addresses_carried_around_a_loop_keep_their_operand():
    body = """
	add.s64 	%rd4, %rd1, %rd3;
$L__BB0_1:
	ld.global.b32 	{ %r3 }, [ %rd5 + 0 ];
	mov.b64 	%rd5, %rd4;
	add.s64 	%rd4, %rd5, 64;
	@%p1 bra 	$L__BB0_1;"""
    assert reads(body) == [read("x_ptr", bits=32)]


def test_what_is_loaded_does_not_carry_the_operand_it_was_loaded_from():
    body = """
	ld.global.b64 	{ %rd4 }, [ %rd1 + 0 ];
	mad.lo.s64 	%rd5, %rd4, 64, %rd2;
	add.s64 	%rd5, %rd5, %rd3;
	ld.global.b32 	{ %r3 }, [ %rd5 + 0 ];"""
    assert reads(body) == [read("x_ptr", bits=64, is_uniform=True), read("w_ptr", bits=32)]


def test_a_selection_belongs_to_both_and_its_condition_to_none():
    body = """
	setp.eq.b64 	%p1, %rd1, %rd2;
	selp.b64 	%rd4, %rd1, %rd2, %p1;
	selp.b64 	%rd5, 0, 16, %p1;
	add.s64 	%rd6, %rd2, %rd5;
	ld.global.b32 	{ %r3 }, [ %rd4 + 0 ];
	ld.global.b32 	{ %r4 }, [ %rd6 + 0 ];"""
    assert reads(body) == [
        read("w_ptr", "x_ptr", bits=32, is_uniform=True),
        read("w_ptr", bits=32, is_uniform=True),
    ]


def test_a_selection_between_parameters_belongs_to_both():
    body = """
	mov.b64 	%rd4, _kernel_param_0;
	mov.b64 	%rd5, _kernel_param_2;
	selp.b64 	%rd6, %rd4, %rd5, %p1;
	ld.param.b64 	%rd7, [%rd6];
	add.s64 	%rd8, %rd7, %rd3;
	ld.global.b32 	{ %r3 }, [ %rd8 + 0 ];"""
    assert reads(body) == [read("w_ptr", "x_ptr", bits=32)]


def test_threads_differ_by_condition_and_by_what_each_has_loaded():
    body = """
	setp.lt.u32 	%p1, %r2, 16;
	selp.b64 	%rd4, 0, 16, %p1;
	add.s64 	%rd5, %rd1, %rd4;
	ld.global.b64 	{ %rd6 }, [ %rd5 + 0 ];
	add.s64 	%rd7, %rd2, %rd6;
	ld.global.b32 	{ %r3 }, [ %rd7 + 0 ];"""
    assert reads(body) == [read("x_ptr", bits=64), read("w_ptr", bits=32)]


def test_an_address_kept_in_shared_memory_has_no_operand():
    body = """
	add.s64 	%rd4, %rd1, %rd3;
	st.shared.b64 	[ %r2 + 0 ], %rd4;
	ld.shared.b64 	%rd5, [ %r2 + 0 ];
	ld.global.b32 	{ %r3 }, [ %rd5 + 0 ];"""
    assert reads(body) == [read(bits=32)]


def test_other_memory_is_not_global_memory():
    body = """
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r2];
	ld.local.b32 %r3, [%rd1];
	ld.shared::cta.b32 %r3, [%r2];
	st.global.b32 [%rd1], %r3;"""
    assert reads(body) == []


def test_a_bulk_copy_is_refused():
    with pytest.raises(RuntimeError, match="has no address that names an operand"):
        reads("cp.async.bulk.tensor.2d.shared::cta.global [%r1], [%rd1, {%r2, %r3}], [%r4];")


def test_parameters_that_do_not_fit_the_signature_are_refused():
    with pytest.raises(RuntimeError, match="PTX declares the pointers"):
        global_reads(HEAD + "}", SIGNATURE | {"stride": "i32"})
