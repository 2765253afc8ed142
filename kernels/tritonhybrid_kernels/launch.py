"""What every launcher shares: argument checks, launch options, the audit's launch cases.

Nothing here reads a device tensor; the only process-wide fact is whether Triton was imported
under its interpreter, and Triton itself fixes that when a kernel is decorated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import torch
import triton

from tritonhybrid_kernels.errors import KernelArgumentError

Mma = Literal["HGMMA", "HMMA", "tensor_core", "none"]

FLOAT_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)

# Read once: @triton.jit chooses between compiler and interpreter when it decorates, so a later
# change of TRITON_INTERPRET could only make the two disagree.
_INTERPRETED: Final[bool] = bool(triton.knobs.runtime.interpret)

# Fused multiply-adds would make a result depend on how the compiler paired the operations; the
# interpreter has no such option and would take it for a kernel argument.
COMPILED_OPTIONS: Final[Mapping[str, Any]] = {"enable_fp_fusion": False}
_INTERPRETED_OPTIONS: Final[Mapping[str, Any]] = {}

# Whether the kernels of a decode step start while the kernel before them drains, where the device
# can (dependent_launch.py). Off until a GPU has run it.
DEPENDENT_LAUNCH: Final[bool] = False
_DEPENDENT_OPTIONS: Final[Mapping[str, Any]] = {**COMPILED_OPTIONS, "PDL": True, "launch_pdl": True}
_DECODE_OPTIONS: Final[Mapping[str, Any]] = {**COMPILED_OPTIONS, "PDL": False}
_INTERPRETED_DECODE_OPTIONS: Final[Mapping[str, Any]] = {"PDL": False}

# The architecture whose configurations the interpreter runs, so that CPU tests walk through the
# tiles that ship for the reference machine.
_INTERPRETED_ARCH: Final = 90


class NarrowRead(NamedTuple):
    """How wide the reads of an operand at least are that can't be 128 bits a thread, and why."""

    bits: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class LaunchCase:
    """One launch as the offline audit compiles it: the kernel, its arguments and what must hold.

    Each op's module has ``audit_cases(arch: int) -> Iterator[LaunchCase]``, built from the same
    configuration functions as its launcher.

    Attributes:
        op: name of the op, as in :class:`tritonhybrid_kernels.ops.Ops`.
        label: the shape in words, unique within the op, e.g. ``"llama-3.1-8b o_proj T=1 bf16"``.
        kernel: the function decorated with ``triton.jit``.
        args: positional arguments in the kernel's order: a ``torch.dtype`` stands for a pointer
            to 16-byte aligned memory of that dtype, numbers for themselves, None for an absent
            pointer.
        constants: the constexpr arguments by name.
        options: num_warps, num_stages and other compile options of this launch.
        mma: the matrix instruction that must be found; "tensor_core" is either of "HGMMA" and
            "HMMA"; "none" means there must be none (fp32, norms, samplers).
        streams: names of the pointer arguments whose every read must move 128 bits a thread.
        narrow: the other pointer arguments that are read, by name. The audit refuses an operand
            that is in neither; a number that all threads of a block read needs no name.
    """

    op: str
    label: str
    kernel: Any
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    mma: Mma
    streams: tuple[str, ...]
    narrow: Mapping[str, NarrowRead] = field(default_factory=dict)

    def dependent(self) -> LaunchCase:
        """Return the same launch as one that starts while its predecessor drains."""
        return replace(
            self,
            label=f"{self.label}, dependent",
            constants={**self.constants, "PDL": True},
            options={**self.options, "launch_pdl": True},
        )


def is_interpreted() -> bool:
    """Tell whether kernels run under Triton's interpreter, on CPU tensors."""
    return _INTERPRETED


def launch_options(device: torch.device) -> Mapping[str, Any]:
    """Return the keyword arguments every launch on `device` passes besides its configuration."""
    return COMPILED_OPTIONS if device.type == "cuda" and not _INTERPRETED else _INTERPRETED_OPTIONS


def decode_options(device: torch.device) -> Mapping[str, Any]:
    """Return what :func:`launch_options` does, and PDL, for a kernel that a decode step launches.

    PDL is a constant of the kernel and, as launch_pdl, an option of its launch: never one alone.
    """
    if device.type != "cuda" or _INTERPRETED:
        return _INTERPRETED_DECODE_OPTIONS
    if DEPENDENT_LAUNCH and torch.version.hip is None and device_arch(device) >= 90:
        return _DEPENDENT_OPTIONS
    return _DECODE_OPTIONS


@cache
def _cuda_arch(device_index: int) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return major * 10 + minor


def device_arch(device: torch.device) -> int:
    """Return the compute capability of a tensor's device, e.g. 90 for sm_90.

    Under the interpreter it is the reference machine's, so CPU tests use the shipped tiles.
    """
    if device.type != "cuda":
        return _INTERPRETED_ARCH
    return _cuda_arch(device.index)


def reject(rule: str, expected: object, got: object, hint: str) -> KernelArgumentError:
    """Build the error of a broken rule, for the caller to raise."""
    return KernelArgumentError(f"{rule}: expected {expected}, got {got}. {hint}")


def require(ok: bool, rule: str, expected: object, got: object, hint: str) -> None:
    """Raise unless `ok`; the parts are put into words only when the rule is broken.

    Args:
        ok: whether the rule holds.
        rule: the rule, starting with the op's name, e.g. ``"linear: weight must be [N, K]"``.
        expected: what would have been right.
        got: what was passed.
        hint: what to do, a full sentence.

    Raises:
        KernelArgumentError: `ok` is False.
    """
    if not ok:
        raise reject(rule, expected, got, hint)


def check_launchable(op: str, device: torch.device) -> None:
    """Check that Triton can run on tensors of `device` in this process.

    Raises:
        KernelArgumentError: a CPU tensor without the interpreter, a CUDA tensor under it, or a
            CUDA device that is not the current one (Triton launches on the current device).
    """
    if _INTERPRETED:
        if device.type != "cpu":
            raise reject(
                f"{op}: the interpreter runs on CPU tensors",
                "cpu",
                device,
                "Unset TRITON_INTERPRET and start again to run on the device.",
            )
        return
    if device.type != "cuda":
        raise reject(
            f"{op}: Triton runs on CUDA tensors",
            "cuda",
            device,
            f"Call {op}_ref on the CPU, or set TRITON_INTERPRET=1 before triton is imported.",
        )
    if device.index != torch.cuda.current_device():
        raise reject(
            f"{op}: tensors must be on the current device",
            f"cuda:{torch.cuda.current_device()}",
            device,
            "Call torch.cuda.set_device or use a torch.cuda.device block.",
        )


def check_operands(op: str, **tensors: torch.Tensor | None) -> None:
    """Check that the tensors share device and float dtype and are contiguous in the last dimension.

    The first tensor sets device and dtype; None entries are absent operands.

    Raises:
        KernelArgumentError: dtype is not fp32, fp16 or bf16, or device, dtype or last stride of
            one operand differs.
    """
    # On the path of every launch: attributes are read once, and words are found only on error.
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if dtype is None:
            dtype, device = tensor.dtype, tensor.device
            if dtype not in FLOAT_DTYPES:
                raise reject(
                    f"{op}: {name} must be a float tensor",
                    "float32, float16 or bfloat16",
                    dtype,
                    "Cast the operands to one of these.",
                )
        elif tensor.dtype != dtype:
            raise reject(
                f"{op}: operands must share one dtype",
                dtype,
                f"{name} of {tensor.dtype}",
                "Cast them to one dtype.",
            )
        elif tensor.device != device:
            raise reject(
                f"{op}: operands must be on one device",
                device,
                f"{name} on {tensor.device}",
                "Move them to one device.",
            )
        check_last_stride(op, name, tensor)


def check_last_stride(op: str, name: str, tensor: torch.Tensor) -> None:
    """Check that neighbours in the last dimension are neighbours in memory.

    Raises:
        KernelArgumentError: the last stride is not 1 and the last dimension has more than one
            element.
    """
    strides = tensor.stride()
    if strides and strides[-1] != 1 and tensor.shape[-1] > 1:
        raise reject(
            f"{op}: {name} must be contiguous in its last dimension",
            "last stride 1",
            f"strides {strides}",
            "Call .contiguous() on it.",
        )


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check that `tensor` has exactly `shape`.

    Raises:
        KernelArgumentError: it has another shape.
    """
    if tensor.shape != shape:
        raise reject(
            f"{op}: {name} has the wrong shape",
            list(shape),
            list(tensor.shape),
            "Check which tensor was passed, and its layout.",
        )


def check_rank(op: str, name: str, tensor: torch.Tensor, rank: int, layout: str) -> None:
    """Check the number of dimensions of `tensor`; `layout` names them, e.g. ``"[T, D]"``.

    Raises:
        KernelArgumentError: it has another number of dimensions.
    """
    if tensor.dim() != rank:
        raise reject(
            f"{op}: {name} must have {rank} dimensions",
            layout,
            list(tensor.shape),
            "Flatten or view it; tokens of all sequences are packed in one dimension.",
        )
