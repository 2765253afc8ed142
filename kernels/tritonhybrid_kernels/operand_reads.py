"""Which operand each read of global memory in a kernel's PTX belongs to, and how wide it is.

Every register carries the pointer parameters its value derives from: a parameter's load starts
the trail, and arithmetic, moves and selections pass it on. A predicate carries none, and neither
does the result of a memory load: an index read from a table does not belong to the table. Registers
are taken without regard to order, to a fixed point, so that loops need no care. A second trail,
which predicates and loads do pass on, marks what differs between the threads of a block; a read
whose address does not is one number for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

_COMMENT: Final = re.compile(r"//[^\n]*")
_DEBUG_SECTION: Final = re.compile(r"^\s*\.section\b.*", re.MULTILINE | re.DOTALL)
# A line that no semicolon ends: a source location, a label, a brace of a scope.
_BARE_LINE: Final = re.compile(r"^\s*(?:\.loc\b.*|[\w$%.]+:|[{}])\s*$", re.MULTILINE)
_STATEMENT: Final = re.compile(r"(?:@!?(?P<guard>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<rest>.*)")
_OPERAND: Final = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]]+")
_REGISTER: Final = re.compile(r"%[\w.]+")
_PARAMETER: Final = re.compile(r"_param_(\d+)\b")
_POINTER_PARAMETER: Final = re.compile(r"\.param\s+\.u64\s+\.ptr\b[^,)]*_param_(\d+)\b")
_VECTOR: Final = re.compile(r"\.v(\d+)\b")
_ELEMENT: Final = re.compile(r"\.[bfsu](\d+)$")

# Registers that differ between the threads of a block.
_THREAD_REGISTERS: Final = ("%tid", "%laneid", "%warpid", "%lanemask")
_THREAD: Final = "%tid"

# Reads that would have to be taken apart in another way.
_BULK_COPY: Final = ("cp.async.bulk", "cp.reduce.async.bulk")


class GlobalRead(NamedTuple):
    """One instruction that reads global memory.

    Attributes:
        operands: the kernel's pointer arguments that its address derives from; more than one
            where the kernel selects between them, none where the trail was lost.
        bits: what a thread moves.
        is_async: a copy to shared memory.
        is_uniform: every thread of a block reads the same address.
    """

    operands: frozenset[str]
    bits: int
    is_async: bool
    is_uniform: bool


class _Instruction(NamedTuple):
    opcode: str
    operands: tuple[str, ...]


def _instructions(ptx: str) -> Iterator[_Instruction]:
    """Yield what a kernel's body executes, guards removed."""
    text = _DEBUG_SECTION.sub("", _COMMENT.sub("", ptx))
    body = text[text.index("{", text.index(".entry")) + 1 :]
    for statement in _BARE_LINE.sub("", body).split(";"):
        # Inline assembly may open a scope on the line of its first instruction.
        match = _STATEMENT.fullmatch(" ".join(statement.split()).lstrip("{} "))
        if match is not None:
            yield _Instruction(match["opcode"], tuple(_OPERAND.findall(match["rest"])))


def _pointer_names(ptx: str, signature: Mapping[str, str]) -> dict[int, str]:
    """Map a parameter's number to its pointer argument; constants are no parameters."""
    entry = ptx.index(".entry")
    declared = {int(n) for n in _POINTER_PARAMETER.findall(ptx[entry : ptx.index("{", entry)])}
    present = [name for name, kind in signature.items() if kind != "constexpr"]
    names = {i: name for i, name in enumerate(present) if signature[name].startswith("*")}
    # Pointers of Triton's own follow those of the signature.
    if {number for number in declared if number < len(present)} != names.keys():
        raise RuntimeError(f"PTX declares the pointers {sorted(declared)}, expected {names}")
    return names


def _registers(operands: Sequence[str]) -> list[str]:
    return [register for operand in operands for register in _REGISTER.findall(operand)]


def _reads_memory(opcode: str) -> bool:
    is_parameter = opcode.startswith("ld.param")
    return opcode.startswith(("ld.", "ldu.", "ldmatrix.", "atom.")) and not is_parameter


def _reads_global(opcode: str) -> bool:
    """Tell global and generic addresses from shared, local, constant and parameter ones."""
    spaces = opcode.split(".")
    if opcode.startswith("cp.async."):
        return "shared" in spaces and "global" in spaces
    return opcode.startswith(("ld.", "ldu.", "atom.")) and not any(
        space.split("::")[0] in ("shared", "local", "const", "param") for space in spaces
    )


def _trails(instructions: Sequence[_Instruction], names: Mapping[int, str]) -> dict[str, set[str]]:
    """Return for each register the operands it derives from, and _THREAD where threads differ."""
    trails: dict[str, set[str]] = {}
    edges: list[tuple[set[str], list[str], bool]] = []
    for opcode, operands in instructions:
        if not operands or operands[0].startswith("["):
            continue
        sources = _registers(operands[1:])
        for target in _registers(operands[:1]):
            trail = trails.setdefault(target, set())
            # A parameter is loaded, or its address taken to select between parameters.
            numbers = (int(n) for operand in operands[1:] for n in _PARAMETER.findall(operand))
            trail.update(names[number] for number in numbers if number in names)
            if any(source.startswith(_THREAD_REGISTERS) for source in sources):
                trail.add(_THREAD)
            is_address = not target.startswith("%p") and not _reads_memory(opcode)
            edges.append((trail, sources, is_address))
    changed = True
    while changed:
        changed = False
        for trail, sources, is_address in edges:
            before = len(trail)
            for source in sources:
                carried = trails.get(source, set())
                trail |= carried if is_address else carried & {_THREAD}
            changed |= len(trail) != before
    return trails


def _read_bits(instruction: _Instruction) -> int:
    opcode, operands = instruction
    if opcode.startswith("cp.async."):
        return int(operands[2], 0) * 8
    element = _ELEMENT.search(opcode)
    if element is None:
        raise RuntimeError(f"the width of {opcode} is unknown")
    vector = _VECTOR.search(opcode)
    return int(element[1]) * (1 if vector is None else int(vector[1]))


def global_reads(ptx: str, signature: Mapping[str, str]) -> list[GlobalRead]:
    """List the reads of global memory in a compiled kernel.

    Args:
        ptx: ``compiled.asm["ptx"]`` of Triton's CompiledKernel.
        signature: ``compiled.src.signature``, in the kernel's order: argument name to type, with
            "constexpr" for what was compiled in and has no parameter.

    Raises:
        RuntimeError: the PTX is not of the form this reads, or copies in bulk (TMA).
    """
    instructions = list(_instructions(ptx))
    trails = _trails(instructions, _pointer_names(ptx, signature))
    reads = []
    for instruction in instructions:
        opcode, operands = instruction
        if opcode.startswith(_BULK_COPY):
            raise RuntimeError(f"{opcode} has no address that names an operand")
        if not _reads_global(opcode):
            continue
        is_async = opcode.startswith("cp.async.")
        trail = set().union(*(trails.get(r, set()) for r in _REGISTER.findall(operands[1])))
        reads.append(
            GlobalRead(
                operands=frozenset(trail - {_THREAD}),
                bits=_read_bits(instruction),
                is_async=is_async,
                is_uniform=_THREAD not in trail,
            )
        )
    return reads
