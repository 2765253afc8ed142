"""Gated feed-forward input: y = act(x Wg^T + bg) * (x Wu^T + bu), act silu, gelu or tanh-gelu.

x [T, D], Wg and Wu [F, D], y [T, F]. Each program reads one tile of x and keeps two fp32
accumulators, so x is read once and neither projection is ever in memory. Gate and up are rounded
to the dtype, the activation is taken in fp32 and rounded, and the product is rounded: the cast
points of Hugging Face's ``act_fn(gate_proj(x)) * up_proj(x)``. Tiles as in matmul_tile, about
half as wide because there are two accumulators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch.nn import functional

from tritonhybrid_kernels.dependent_launch import await_predecessor, prefetch_rows
from tritonhybrid_kernels.host_linear import host_linear
from tritonhybrid_kernels.launch import (
    LaunchCase,
    check_launchable,
    check_operands,
    check_rank,
    check_shape,
    decode_options,
    device_arch,
    require,
)
from tritonhybrid_kernels.matmul_tile import (
    AUDIT_ROWS,
    AUDIT_ROWS_SMALL,
    AUDIT_ROWS_VARIANT,
    BIAS_READ,
    MatmulConfig,
    matmul_config,
    tile_coordinates,
    tile_rows,
)

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh")


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """Return the activation of fp32 x."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh(u)) = sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_silu_kernel(
    x_ptr,  # [T, D]
    gate_weight_ptr,  # [F, D]
    up_weight_ptr,  # [F, D]
    gate_bias_ptr,  # [F] or None
    up_bias_ptr,  # [F] or None
    y_ptr,  # [T, F]
    num_rows,
    num_columns,
    depth,
    stride_xm,
    stride_gn,
    stride_un,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICT_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
            prefetch_rows(gate_weight_ptr, columns, stride_gn, depth, 256 // BLOCK_N)
            prefetch_rows(up_weight_ptr, columns, stride_un, depth, 256 // BLOCK_N)
        await_predecessor()
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    gate_ptrs = gate_weight_ptr + columns[None, :] * stride_gn + offs_k[:, None]
    up_ptrs = up_weight_ptr + columns[None, :] * stride_un + offs_k[:, None]
    gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            gate_w = tl.load(gate_ptrs, eviction_policy=EVICT_W)
            up_w = tl.load(up_ptrs, eviction_policy=EVICT_W)
        else:
            mask_k = offs_k < depth - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            gate_w = tl.load(gate_ptrs, mask=mask_k[:, None], other=0.0, eviction_policy=EVICT_W)
            up_w = tl.load(up_ptrs, mask=mask_k[:, None], other=0.0, eviction_policy=EVICT_W)
        gate_acc = tl.dot(x, gate_w, gate_acc, input_precision="ieee")
        up_acc = tl.dot(x, up_w, up_acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    if HAS_BIAS:
        mask_n = offs_n < num_columns
        gate_bias = tl.load(gate_bias_ptr + offs_n, mask=mask_n, other=0.0)
        up_bias = tl.load(up_bias_ptr + offs_n, mask=mask_n, other=0.0)
        gate_acc += gate_bias.to(tl.float32)[None, :]
        up_acc += up_bias.to(tl.float32)[None, :]
    dtype = y_ptr.dtype.element_ty
    activated = _activate(gate_acc.to(dtype).to(tl.float32), ACTIVATION).to(dtype)
    y = (activated.to(tl.float32) * up_acc.to(dtype).to(tl.float32)).to(dtype)
    mask = (offs_m < num_rows)[:, None] & (offs_n < num_columns)[None, :]
    tl.store(y_ptr + rows[:, None] * num_columns + offs_n[None, :], y, mask=mask)


def gate_up_silu(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """Compute act(x Wg^T + bg) * (x Wu^T + bu) with one Triton launch.

    Args:
        x: [T, D], float32, float16 or bfloat16; rows may be strided, T may be 0.
        gate_weight: [F, D], as nn.Linear holds it.
        up_weight: [F, D].
        gate_bias: [F]; both biases are given or neither.
        up_bias: [F].
        activation: "silu", "gelu" (erf) or "gelu_tanh".
        config: tile to use instead of the heuristic's.

    Returns:
        [T, F], new and contiguous, in x's dtype.

    Raises:
        KernelArgumentError: shapes, dtypes, devices or strides do not fit, the activation is
            unknown, or Triton can't run on x's device in this process.
    """
    num_rows, depth, num_columns = _check(x, gate_weight, up_weight, gate_bias, up_bias, activation)
    check_launchable("gate_up_silu", x.device)
    y = x.new_empty(num_rows, num_columns)
    if num_rows == 0:
        return y
    if config is None:
        config = matmul_config(
            num_rows, num_columns, depth, x.dtype, device_arch(x.device), num_weights=2
        )
    num_tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(num_columns, config.block_n)
    _gate_up_silu_kernel[(num_tiles,)](
        x,
        gate_weight,
        up_weight,
        gate_bias,
        up_bias,
        y,
        num_rows,
        num_columns,
        depth,
        x.stride(0),
        gate_weight.stride(0),
        up_weight.stride(0),
        **config.constants(depth, num_rows),
        HAS_BIAS=gate_bias is not None,
        ACTIVATION=activation,
        **config.options,
        **decode_options(x.device),
    )
    return y


def gate_up_silu_ref(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
) -> torch.Tensor:
    """Compute the same as :func:`gate_up_silu` with torch, on any device; see there."""
    if activation not in ACTIVATIONS:
        _check(x, gate_weight, up_weight, gate_bias, up_bias, activation)
    gate = host_linear(x, gate_weight, gate_bias)
    if activation == "silu":
        gate = functional.silu(gate, inplace=True)
    else:
        gate = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return gate.mul_(host_linear(x, up_weight, up_bias))


def _check(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    activation: str,
) -> tuple[int, int, int]:
    """Check the operands and return (T, D, F)."""
    op = "gate_up_silu"
    check_operands(
        op,
        x=x,
        gate_weight=gate_weight,
        up_weight=up_weight,
        gate_bias=gate_bias,
        up_bias=up_bias,
    )
    check_rank(op, "x", x, 2, "[T, D]")
    check_rank(op, "gate_weight", gate_weight, 2, "[F, D]")
    num_rows, depth = x.shape
    num_columns = gate_weight.shape[0]
    check_shape(op, "gate_weight", gate_weight, (num_columns, depth))
    check_shape(op, "up_weight", up_weight, (num_columns, depth))
    require(
        (gate_bias is None) == (up_bias is None),
        f"{op}: the biases come together",
        "both or neither",
        "one of them",
        "Pass zeros for the missing one.",
    )
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None:
            check_shape(op, name, bias, (num_columns,))
    require(
        activation in ACTIVATIONS,
        f"{op}: unknown activation",
        ", ".join(ACTIVATIONS),
        activation,
        "Run another activation as a module, outside this op.",
    )
    return num_rows, depth, num_columns


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches of Llama-3.1-8B, Qwen3-0.6B and SmolLM2-135M, and of biased models."""
    for label, depth, num_columns, has_bias, activation, rows in (
        ("llama-3.1-8b", 4096, 14336, False, "silu", AUDIT_ROWS),
        ("qwen3-0.6b", 1024, 3072, False, "silu", AUDIT_ROWS_SMALL),
        ("smollm2-135m", 576, 1536, False, "silu", AUDIT_ROWS_SMALL),
        ("biased gelu", 2048, 8192, True, "gelu", AUDIT_ROWS_VARIANT),
        ("biased gelu_tanh", 2048, 8192, True, "gelu_tanh", AUDIT_ROWS_VARIANT),
    ):
        for num_rows, dtype in rows:
            config = matmul_config(num_rows, num_columns, depth, dtype, arch, num_weights=2)
            bias = dtype if has_bias else None
            yield LaunchCase(
                op="gate_up_silu",
                label=f"{label} T={num_rows} {dtype}",
                kernel=_gate_up_silu_kernel,
                args=(
                    *(dtype, dtype, dtype, bias, bias, dtype),
                    *(num_rows, num_columns, depth, depth, depth, depth),
                ),
                constants={
                    **config.constants(depth, num_rows),
                    "HAS_BIAS": has_bias,
                    "ACTIVATION": activation,
                    "PDL": False,
                },
                options=config.options,
                mma=config.expected_mma(dtype, arch),
                streams=("x_ptr", "gate_weight_ptr", "up_weight_ptr"),
                narrow={"gate_bias_ptr": BIAS_READ, "up_bias_ptr": BIAS_READ} if has_bias else {},
            )
