"""Residual addition and RMS norm in one pass: r = r + x; y = r * rsqrt(mean(r^2) + eps) * w.

x and residual [T, D], w [D], y [T, D]. One program holds one row in registers, whatever the batch,
so a row's bits do not depend on its neighbours. The sum r is rounded to the dtype before it is
normalised, as the residual stream in memory is. Two cast rules exist: Llama's and Qwen's models
round the normalised value and multiply by the weight in the dtype; Gemma's multiply by (1 + w) in
fp32 and round once. (Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl

from tritonhybrid_kernels.dependent_launch import await_predecessor
from tritonhybrid_kernels.launch import (
    LaunchCase,
    check_launchable,
    check_operands,
    check_rank,
    check_shape,
    decode_options,
    require,
)

# A row is held in the registers of one block: 64 fp32 values a thread at 16 warps.
MAX_COLUMNS: Final = 32768


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D] or None
    weight_ptr,  # [D]
    y_ptr,  # [T, D]
    num_columns,
    stride_xm,
    stride_rm,
    stride_ym,
    eps,
    weight_offset,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < num_columns
    dtype = y_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if PDL:
        await_predecessor()
    r = tl.load(x_ptr + row * stride_xm + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r_ptrs = residual_ptr + row * stride_rm + offs_d
        r = (tl.load(r_ptrs, mask=mask_d, other=0.0).to(tl.float32) + r).to(dtype)
        tl.store(r_ptrs, r, mask=mask_d)
        r = r.to(tl.float32)
    normed = r * tl.rsqrt(tl.sum(r * r, axis=0) / num_columns + eps)
    if HAS_OFFSET:
        y = normed * (weight_offset + weight)
    else:
        y = normed.to(dtype).to(tl.float32) * weight
    tl.store(y_ptr + row * stride_ym + offs_d, y.to(dtype), mask=mask_d)


def _num_warps(block_d: int) -> int:
    """Return the warps of a block: 8 values or more a thread, so loads stay 128 bits wide."""
    return min(max(block_d // 256, 1), 16)


def add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add x to the residual stream in place, and normalise the sum, with one Triton launch.

    Args:
        x: [T, D], float32, float16 or bfloat16, D at most 32768; rows may be strided, T may be 0.
        weight: [D].
        eps: added to the mean square.
        residual: [T, D], overwritten with round(residual + x), which is then normalised. None:
            x itself is normalised and nothing but the result is written.
        weight_offset: 0 for Llama's rule, round(round(norm) * w); anything else, 1 in Gemma, for
            round(norm * (weight_offset + w)).
        out: [T, D] to write; may be `x`, never `residual`.

    Returns:
        [T, D] in x's dtype: `out`, or a new tensor.

    Raises:
        KernelArgumentError: shapes, dtypes, devices or strides do not fit, or Triton can't run
            on x's device in this process.
    """
    num_rows, num_columns = _check(x, weight, residual, out)
    check_launchable("add_rms_norm", x.device)
    y = x.new_empty(num_rows, num_columns) if out is None else out
    if num_rows == 0:
        return y
    block_d = triton.next_power_of_2(num_columns)
    _add_rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        y,
        num_columns,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        eps,
        weight_offset,
        BLOCK_D=block_d,
        HAS_RESIDUAL=residual is not None,
        HAS_OFFSET=weight_offset != 0.0,
        num_warps=_num_warps(block_d),
        **decode_options(x.device),
    )
    return y


def add_rms_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the same as :func:`add_rms_norm` with torch, on any device; see there."""
    r = x if residual is None else residual.add_(x)
    if x.dtype == torch.float32 and weight_offset == 0.0 and out is None:
        # In fp32 no cast separates the factors, so torch's one call does.
        return torch.rms_norm(r, (r.shape[-1],), weight, eps)
    normed = torch.rms_norm(r.float(), (r.shape[-1],), None, eps)
    if weight_offset == 0.0:
        normed = normed.to(x.dtype)
        y = normed.mul_(weight) if out is None else torch.mul(normed, weight, out=out)
        return y
    y = normed.mul_(weight.float() + weight_offset)
    return y.to(x.dtype) if out is None else out.copy_(y)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[int, int]:
    """Check the operands and return (T, D)."""
    op = "add_rms_norm"
    check_operands(op, x=x, weight=weight, residual=residual, out=out)
    check_rank(op, "x", x, 2, "[T, D]")
    num_rows, num_columns = x.shape
    check_shape(op, "weight", weight, (num_columns,))
    if residual is not None:
        check_shape(op, "residual", residual, (num_rows, num_columns))
    if out is not None:
        check_shape(op, "out", out, (num_rows, num_columns))
    require(
        0 < num_columns <= MAX_COLUMNS,
        f"{op}: a row must fit the registers of one block",
        f"D in 1..{MAX_COLUMNS}",
        num_columns,
        "Use torch.nn.functional.rms_norm for such a layer.",
    )
    return num_rows, num_columns


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches at the hidden sizes of known models, and the widest row allowed."""
    for label, num_columns, dtype, has_residual, weight_offset in (
        ("llama-3.1-8b", 4096, torch.bfloat16, True, 0.0),
        ("llama-3.1-8b", 4096, torch.float16, True, 0.0),
        ("llama-3.1-8b", 4096, torch.float32, True, 0.0),
        ("llama-3.1-8b first norm", 4096, torch.bfloat16, False, 0.0),
        ("qwen3-0.6b", 1024, torch.bfloat16, True, 0.0),
        ("smollm2-135m", 576, torch.bfloat16, True, 0.0),
        ("gemma-2-9b", 3584, torch.bfloat16, True, 1.0),
        ("widest", MAX_COLUMNS, torch.bfloat16, True, 0.0),
    ):
        block_d = triton.next_power_of_2(num_columns)
        yield LaunchCase(
            op="add_rms_norm",
            label=f"{label} D={num_columns} {dtype}",
            kernel=_add_rms_norm_kernel,
            args=(
                *(dtype, dtype if has_residual else None, dtype, dtype),
                *(num_columns, num_columns, num_columns, num_columns, 1e-5, weight_offset),
            ),
            constants={
                "BLOCK_D": block_d,
                "HAS_RESIDUAL": has_residual,
                "HAS_OFFSET": weight_offset != 0.0,
                "PDL": False,
            },
            options={"num_warps": _num_warps(block_d)},
            mma="none",
            streams=("x_ptr", "weight_ptr", *(("residual_ptr",) if has_residual else ())),
        )
