"""Make Triton's interpreter compute bf16 and fp8 as numbers; for tests only.

The interpreter keeps bf16 as uint16 and fp8 as uint8 and runs numpy's integer arithmetic on the
bit patterns (tl.dot is off by 1e10, fp32 to bf16 truncates). `install` decodes such operands to
fp32 before each float operation and rounds to nearest even after it. Import after
TRITON_INTERPRET=1 is set. Tried with triton 3.6 (numpy < 2.4), 3.7.1 and 3.9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder

TORCH_TYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
STORAGE_TYPES = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16)}

FLOAT_OP_PREFIXES = ("create_f", "create_min", "create_max", "create_precise", "create_approx")
FLOAT_OPS = {
    *("create_exp", "create_exp2", "create_log", "create_log2", "create_sqrt", "create_rsqrt"),
    *("create_sin", "create_cos", "create_erf", "create_floor", "create_ceil", "create_clampf"),
}
CASTS = ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc")
HANDLED_APART = {"create_fp_to_fp", "create_dot", *(f"create_{name}" for name in CASTS)}


def decode(bits: Any, scalar_type: Any) -> Any:
    """Return the fp32 array that `bits` of a Triton type stand for."""
    torch_type = TORCH_TYPES[scalar_type]
    storage, _ = STORAGE_TYPES[torch_type.itemsize]
    view_type = np.int16 if storage is torch.int16 else np.uint8
    flat = np.ascontiguousarray(bits).view(view_type)
    return torch.from_numpy(flat).view(torch_type).float().numpy().reshape(np.shape(bits))


def encode(values: Any, scalar_type: Any) -> Any:
    """Round an fp32 array to nearest even and return the bits; fp8 saturates as cvt.satfinite."""
    torch_type = TORCH_TYPES[scalar_type]
    storage, numpy_type = STORAGE_TYPES[torch_type.itemsize]
    array = np.asarray(values, np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
    if torch_type.itemsize == 1:
        largest = torch.finfo(torch_type).max
        tensor = tensor.clamp(-largest, largest)
    return tensor.to(torch_type).view(storage).numpy().view(numpy_type).reshape(array.shape)


def _is_bits(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar in TORCH_TYPES


def _widen(handle: Any) -> Any:
    if not _is_bits(handle):
        return handle
    return Handle(decode(handle.data, handle.dtype.scalar), tl.float32)


def _narrow(handle: Any, scalar_type: Any) -> Any:
    if handle.data.dtype != np.float32:
        return handle
    return Handle(encode(handle.data, scalar_type), scalar_type)


def _wrap_float_op(name: str) -> None:
    original = getattr(Builder, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        scalar_type = next((arg.dtype.scalar for arg in args if _is_bits(arg)), None)
        if scalar_type is None:
            return original(self, *args, **kwargs)
        return _narrow(original(self, *map(_widen, args), **kwargs), scalar_type)

    setattr(Builder, name, wrapped)


def _wrap_casts() -> None:
    original = Builder.cast_impl

    def cast(self: Any, source: Any, target_type: Any) -> Any:
        scalar_type = target_type.scalar
        if _is_bits(source):
            source = _widen(source)
        if scalar_type in TORCH_TYPES:
            return Handle(encode(source.data.astype(np.float32), scalar_type), scalar_type)
        if scalar_type == tl.float32 and source.data.dtype == np.float32:
            return Handle(source.data, tl.float32)
        return original(self, source, target_type)

    Builder.cast_impl = cast
    for name in CASTS:
        setattr(Builder, f"create_{name}", lambda self, src, dst: self.cast_impl(src, dst))
    Builder.create_fp_to_fp = lambda self, src, dst, rounding: self.cast_impl(src, dst)


def _wrap_dot() -> None:
    original = Builder.create_dot

    def dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        a_values, b_values = _widen(a).data, _widen(b).data
        if not np.issubdtype(a_values.dtype, np.floating):
            return original(self, a, b, accumulator, *rest)
        # In fp64, rounded once: a matrix unit sums each element in one order, numpy's BLAS in an
        # order that differs between the rows of a tile.
        product = np.matmul(a_values.astype(np.float64), b_values.astype(np.float64))
        total = product.astype(accumulator.data.dtype) + accumulator.data
        return Handle(total, accumulator.dtype.scalar)

    Builder.create_dot = dot


def _wrap_reductions(cls: Any) -> None:
    original: Callable[..., Any] = cls.apply_impl

    def widen_tensor(tensor: Any) -> Any:
        if tensor.dtype.scalar not in TORCH_TYPES:
            return tensor
        kind = tl.block_type(tl.float32, tensor.shape) if tensor.type.is_block() else tl.float32
        return tl.core.tensor(_widen(tensor.handle), kind)

    def apply(self: Any, tensors: Any) -> Any:
        scalar_types = [tensor.dtype.scalar for tensor in tensors]
        if not any(scalar_type in TORCH_TYPES for scalar_type in scalar_types):
            return original(self, tensors)
        result = original(self, tuple(map(widen_tensor, tensors)))
        parts = result if isinstance(result, (tuple, list)) else (result,)
        narrowed = []
        # A reduction may return fewer tensors than it took.
        for part, scalar_type in zip(parts, scalar_types, strict=False):
            if scalar_type in TORCH_TYPES:
                bits = encode(part.handle.data, scalar_type)
                bits = bits if part.type.is_block() else bits.reshape(-1)[0]
                part = self.to_tensor(bits, scalar_type)
            narrowed.append(part)
        return type(result)(narrowed) if isinstance(result, (tuple, list)) else narrowed[0]

    cls.apply_impl = apply


def install() -> None:
    """Patch the interpreter of this process, once."""
    if getattr(Builder, "decodes_bf16", False):
        return
    Builder.decodes_bf16 = True
    for name in dir(Builder):
        is_float_op = name.startswith(FLOAT_OP_PREFIXES) or name in FLOAT_OPS
        if is_float_op and name not in HANDLED_APART and callable(getattr(Builder, name)):
            _wrap_float_op(name)
    _wrap_casts()
    _wrap_dot()
    if not hasattr(Builder, "get_bf16"):
        Builder.get_bf16 = lambda self, value: Handle(
            encode(np.array([value], np.float32), tl.bfloat16), tl.bfloat16
        )
    for cls in (interpreter.ReduceOps, interpreter.ScanOps):
        _wrap_reductions(cls)
