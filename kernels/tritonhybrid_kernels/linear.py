"""Linear layer with bias and residual in its epilogue: y = round(x W^T + b) + residual.

x [T, K], W [N, K], b [N], residual and y [T, N]. The product accumulates in fp32 and takes the
bias there, is rounded to the dtype, and the residual is added to the rounded value and rounded
again: Hugging Face's two cast points, in one pass over y. Tiles as in matmul_tile: a decode step
reads W once with BLOCK_M = 16 and as many columns a program as still fill the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from tritonhybrid_kernels.dependent_launch import await_predecessor, prefetch_rows
from tritonhybrid_kernels.host_linear import host_linear
from tritonhybrid_kernels.launch import (
    LaunchCase,
    NarrowRead,
    check_launchable,
    check_operands,
    check_rank,
    check_shape,
    decode_options,
    device_arch,
)
from tritonhybrid_kernels.matmul_tile import (
    AUDIT_ROWS,
    AUDIT_ROWS_SMALL,
    AUDIT_ROWS_VARIANT,
    BIAS_READ,
    MatmulConfig,
    matmul_config,
    matmul_tile,
    tile_coordinates,
    tile_rows,
)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    residual_ptr,  # [T, N] or None
    y_ptr,  # [T, N]
    num_rows,
    num_columns,
    depth,
    stride_xm,
    stride_wn,
    stride_rm,
    stride_ym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICT_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    tile_m, tile_n = tile_coordinates(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N), GROUP_M
    )
    offs_m, rows = tile_rows(tile_m, num_rows, BLOCK_M)
    offs_n, columns = tile_rows(tile_n, num_columns, BLOCK_N)
    if PDL:
        # Only where one tile holds all rows: there each weight is read once, by one program.
        if EVICT_W == "evict_first":
            prefetch_rows(w_ptr, columns, stride_wn, depth, 512 // BLOCK_N)
        await_predecessor()
    offs_k = tl.arange(0, BLOCK_K)
    acc = matmul_tile(
        x_ptr + rows[:, None] * stride_xm + offs_k[None, :],
        w_ptr + columns[None, :] * stride_wn + offs_k[:, None],
        depth,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        EVICT_W,
    )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < num_columns, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    mask = (offs_m < num_rows)[:, None] & (offs_n < num_columns)[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + rows[:, None] * stride_rm + offs_n[None, :], mask=mask, other=0.0
        )
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * stride_ym + offs_n[None, :], y, mask=mask)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """Compute round(x W^T + b) + residual with Triton.

    Args:
        x: [T, K], float32, float16 or bfloat16; rows may be strided, T may be 0.
        weight: [N, K], as nn.Linear holds it.
        bias: [N].
        residual: [T, N], added after rounding.
        out: [T, N] to write; may be `residual` itself, never overlap `x`.
        config: tile to use instead of the heuristic's.

    Returns:
        [T, N] in x's dtype: `out`, or a new tensor.

    Raises:
        KernelArgumentError: shapes, dtypes, devices or strides do not fit, or Triton can't run
            on x's device in this process.
    """
    num_rows, num_columns, depth = _check(x, weight, bias, residual, out)
    check_launchable("linear", x.device)
    y = x.new_empty(num_rows, num_columns) if out is None else out
    if num_rows == 0:
        return y
    if config is None:
        config = matmul_config(num_rows, num_columns, depth, x.dtype, device_arch(x.device))
    num_tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(num_columns, config.block_n)
    _linear_kernel[(num_tiles,)](
        x,
        weight,
        bias,
        residual,
        y,
        num_rows,
        num_columns,
        depth,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        **config.constants(depth, num_rows),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        **config.options,
        **decode_options(x.device),
    )
    return y


def linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the same as :func:`linear` with torch, on any device; see there.

    Torch's own checks have to do: the launcher's would cost a decode step a tenth of its host time.
    """
    if residual is not None:
        y = host_linear(x, weight, bias)
        return y.add_(residual) if out is None else torch.add(residual, y, out=out)
    if out is None:
        return host_linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[int, int, int]:
    """Check the operands and return (T, N, K)."""
    check_operands("linear", x=x, weight=weight, bias=bias, residual=residual, out=out)
    check_rank("linear", "x", x, 2, "[T, K]")
    check_rank("linear", "weight", weight, 2, "[N, K]")
    num_rows, depth = x.shape
    num_columns = weight.shape[0]
    check_shape("linear", "weight", weight, (num_columns, depth))
    if bias is not None:
        check_shape("linear", "bias", bias, (num_columns,))
    if residual is not None:
        check_shape("linear", "residual", residual, (num_rows, num_columns))
    if out is not None:
        check_shape("linear", "out", out, (num_rows, num_columns))
    return num_rows, num_columns, depth


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the o and down projections of Llama-3.1-8B, Qwen3-0.6B, SmolLM2-135M and Phi-2."""
    for label, num_columns, depth, has_bias, rows in (
        ("llama-3.1-8b o_proj", 4096, 4096, False, AUDIT_ROWS),
        ("llama-3.1-8b down_proj", 4096, 14336, False, AUDIT_ROWS),
        ("qwen3-0.6b down_proj", 1024, 3072, False, AUDIT_ROWS_SMALL),
        ("smollm2-135m o_proj", 576, 576, False, AUDIT_ROWS_SMALL),
        ("phi-2 down_proj", 2560, 10240, True, AUDIT_ROWS_VARIANT),
    ):
        for num_rows, dtype in rows:
            config = matmul_config(num_rows, num_columns, depth, dtype, arch)
            narrow = {"bias_ptr": BIAS_READ} if has_bias else {}
            elements = config.block_m * config.block_n // (32 * config.num_warps)
            has_wide_residual = elements * dtype.itemsize >= 16
            if not has_wide_residual:
                reason = f"{elements} numbers of a tile a thread, beside {depth} times as many of w"
                narrow["residual_ptr"] = NarrowRead(8 * elements * dtype.itemsize, reason)
            yield LaunchCase(
                op="linear",
                label=f"{label} T={num_rows} {dtype}",
                kernel=_linear_kernel,
                args=(
                    *(dtype, dtype, dtype if has_bias else None, dtype, dtype),
                    *(num_rows, num_columns, depth, depth, depth, num_columns, num_columns),
                ),
                constants={
                    **config.constants(depth, num_rows),
                    "HAS_BIAS": has_bias,
                    "HAS_RESIDUAL": True,
                    "PDL": False,
                },
                options=config.options,
                mma=config.expected_mma(dtype, arch),
                streams=("x_ptr", "w_ptr", *(("residual_ptr",) if has_wide_residual else ())),
                narrow=narrow,
            )
