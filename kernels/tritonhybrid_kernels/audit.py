"""Compile launches for a GPU that is not there and read what the machine code does.

A fake active driver lets ``kernel.warmup`` take the route of a real launch: Triton itself derives
the signature and the divisibility of pointers and sizes. cuobjdump from Triton's wheel then gives
registers, spills, matrix instructions and load widths, and the PTX which operand a load belongs
to. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.launch import COMPILED_OPTIONS, LaunchCase, is_interpreted
from tritonhybrid_kernels.operand_reads import global_reads

MAX_SPILLS: Final = 8

# The widest read a thread can make.
STREAM_BITS: Final = 128

# Shared memory one block may use, in bytes (CUDA C++ Programming Guide, compute capabilities,
# less the 1 KiB the system keeps).
SHARED_LIMIT_BYTES: Final = {80: 166912, 90: 232448}

# In a report, the operand of a read whose address the analysis lost: the audit refuses it.
UNKNOWN_OPERAND: Final = "an unknown operand"

MmaKind = Literal["HGMMA", "HMMA", "none"]

_TARGET = "cuda"
_WARP_SIZE = 32
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """What one compiled launch costs and uses.

    Attributes:
        registers: a thread.
        spills: instructions that load or store thread-local memory.
        shared_bytes: a block.
        mma: the matrix instruction in use, "none" without tensor cores.
        num_mma: how many of them.
        load_widths: loads from global memory to registers, by width in bits.
        async_widths: copies from global to shared memory (pipelined tiles), by width in bits.
        operand_widths: both, by the pointer argument they read and by width in bits, as the PTX
            has them; reads of one number by all threads of a block are left out. A read that
            selects between operands counts for each of them.
        num_warps: a block.
    """

    registers: int
    spills: int
    shared_bytes: int
    mma: MmaKind
    num_mma: int
    load_widths: Counter[int]
    async_widths: Counter[int]
    operand_widths: Mapping[str, Counter[int]]
    num_warps: int


class _OfflineDriver:
    """As much of a driver as ``JITFunction.warmup`` asks for; nothing is loaded or launched."""

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self._target = GPUTarget(_TARGET, arch, _WARP_SIZE)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # The key of Triton's cache of compiled kernels: one entry an architecture.
        return self._arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@contextmanager
def _offline_driver(arch: int) -> Iterator[None]:
    driver.set_active(_OfflineDriver(arch))
    try:
        yield
    finally:
        # Not reset_active(): that would build the default driver, which needs a GPU.
        driver._active = None


def compile_case(case: LaunchCase, arch: int) -> Any:
    """Compile one launch for `arch` (e.g. 90) as a launch on such a GPU would.

    Returns:
        Triton's CompiledKernel.

    Raises:
        KernelArgumentError: the process runs Triton's interpreter, which compiles nothing.
    """
    if is_interpreted():
        raise KernelArgumentError(
            "audit: kernels must be compiled: expected a process without TRITON_INTERPRET, got "
            "the interpreter. Run the audit by itself, with TRITON_INTERPRET unset."
        )
    with _offline_driver(arch):
        return case.kernel.warmup(
            *case.args, grid=(1,), **case.constants, **case.options, **COMPILED_OPTIONS
        )


@lru_cache(maxsize=512)
def _disassemble(cubin: bytes) -> tuple[int, Counter[str]]:
    """Return the registers a thread uses, and how often each machine instruction occurs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers = re.search(r"\bREG:(\d+)", listing)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {listing[:200]!r}")
    return int(registers.group(1)), Counter(_INSTRUCTION.findall(listing))


def _load_width(instruction: str) -> int:
    """Return the bits a load instruction moves a thread, from its suffixes."""
    suffixes = instruction.split(".")
    for width in (256, 128, 64):
        if str(width) in suffixes:
            return width
    if "U16" in suffixes or "S16" in suffixes:
        return 16
    return 8 if "U8" in suffixes or "S8" in suffixes else 32


def _operand_widths(compiled: Any) -> dict[str, Counter[int]]:
    """Count the reads by operand and by width in bits, without numbers that all threads share."""
    widths: dict[str, Counter[int]] = {}
    for read in global_reads(compiled.asm["ptx"], compiled.src.signature):
        if read.is_uniform and read.operands and read.bits < STREAM_BITS:
            continue
        for name in read.operands or (UNKNOWN_OPERAND,):
            widths.setdefault(name, Counter())[read.bits] += 1
    return widths


def inspect_kernel(compiled: Any) -> KernelReport:
    """Read registers, spills, shared memory, matrix instructions and load widths of a kernel."""
    registers, instructions = _disassemble(compiled.asm["cubin"])
    opcodes: Counter[str] = Counter()
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "LDGSTS": Counter()}
    for instruction, count in instructions.items():
        opcode = instruction.split(".")[0]
        opcodes[opcode] += count
        if opcode in widths:
            widths[opcode][_load_width(instruction)] += count
    mma: MmaKind = "HGMMA" if opcodes["HGMMA"] else "HMMA" if opcodes["HMMA"] else "none"
    return KernelReport(
        registers=registers,
        spills=opcodes["LDL"] + opcodes["STL"],
        shared_bytes=compiled.metadata.shared,
        mma=mma,
        num_mma=opcodes[mma],
        load_widths=widths["LDG"],
        async_widths=widths["LDGSTS"],
        operand_widths=_operand_widths(compiled),
        num_warps=compiled.metadata.num_warps,
    )


def _broken_reads(case: LaunchCase, report: KernelReport) -> list[str]:
    """Name the operands that are read in another way than the case says."""
    broken = []
    widths = report.operand_widths
    for name in case.streams:
        if name not in widths:
            broken.append(f"{name} is named as a stream, but not read")
        elif min(widths[name]) < STREAM_BITS:
            broken.append(
                f"{name} is not read {STREAM_BITS} bits at a time: reads by width "
                f"{dict(widths[name])}"
            )
    for name, (bits, reason) in case.narrow.items():
        if name not in widths:
            broken.append(f"{name} is named as a narrow read ({reason}), but not read")
        elif min(widths[name]) < bits:
            broken.append(
                f"{name} is not read {bits} bits at a time: reads by width {dict(widths[name])}"
            )
        elif min(widths[name]) >= STREAM_BITS:
            broken.append(f"{name} is named as a narrow read ({reason}), but is a stream")
    for name in sorted(widths.keys() - {*case.streams, *case.narrow}):
        broken.append(f"{name} is read, but named neither as a stream nor as a narrow read")
    return broken


def shipped_cases(op: str, arch: int) -> Iterator[LaunchCase]:
    """Yield the launches of an op that may ship for `arch`, dependent ones too where it has them.

    Raises:
        ModuleNotFoundError: there is no such op.
    """
    for case in import_module(f"tritonhybrid_kernels.{op}").audit_cases(arch):
        yield case
        if arch >= 90 and "PDL" in case.constants:
            yield case.dependent()


def audit_case(case: LaunchCase, arch: int) -> tuple[KernelReport, list[str]]:
    """Compile one launch and check what must hold before it may ship.

    Returns:
        The report and the broken rules in words, empty when the launch may ship.
    """
    report = inspect_kernel(compile_case(case, arch))
    broken = []
    if report.spills > MAX_SPILLS:
        broken.append(f"{report.spills} spill instructions, at most {MAX_SPILLS} allowed")
    if report.shared_bytes > SHARED_LIMIT_BYTES[arch]:
        limit = SHARED_LIMIT_BYTES[arch]
        broken.append(f"{report.shared_bytes} bytes of shared memory, sm_{arch} has {limit}")
    allowed = ("HGMMA", "HMMA") if case.mma == "tensor_core" else (case.mma,)
    if report.mma not in allowed:
        broken.append(f"matrix instruction {report.mma}, expected {' or '.join(allowed)}")
    return report, broken + _broken_reads(case, report)
