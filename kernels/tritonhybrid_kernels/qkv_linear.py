"""Query, key and value projections in one launch: q = x Wq^T + bq, k = x Wk^T + bk, v likewise.

x [T, D], Wq [H*E, D], Wk and Wv [K*E, D], each where the training model keeps it: the columns of
all three are one line of tiles, and a program picks its weight, bias and output by its place in
it. No concatenated copy exists, and one launch is wide enough to fill the GPU at a decode step
where the k and v projections alone are not. Tiles as in matmul_tile.
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
    matmul_tile,
    tile_coordinates,
    tile_rows,
)


@triton.jit(do_not_specialize=["num_rows"])
def _qkv_linear_kernel(
    x_ptr,  # [T, D]
    q_weight_ptr,  # [H*E, D]
    k_weight_ptr,  # [K*E, D]
    v_weight_ptr,  # [K*E, D]
    q_bias_ptr,  # [H*E] or None
    k_bias_ptr,  # [K*E] or None
    v_bias_ptr,  # [K*E] or None
    q_ptr,  # [T, H*E]
    k_ptr,  # [T, K*E]
    v_ptr,  # [T, K*E]
    num_rows,
    q_columns,
    kv_columns,
    depth,
    stride_xm,
    stride_qn,
    stride_kn,
    stride_vn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICT_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    q_tiles = tl.cdiv(q_columns, BLOCK_N)
    kv_tiles = tl.cdiv(kv_columns, BLOCK_N)
    tile_m, tile_n = tile_coordinates(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), q_tiles + 2 * kv_tiles, GROUP_M
    )
    bias_ptr = q_bias_ptr
    if tile_n < q_tiles:
        w_ptr = q_weight_ptr
        y_ptr = q_ptr
        stride_wn = stride_qn
        num_columns = q_columns
    elif tile_n < q_tiles + kv_tiles:
        w_ptr = k_weight_ptr
        y_ptr = k_ptr
        stride_wn = stride_kn
        num_columns = kv_columns
        tile_n -= q_tiles
        if HAS_BIAS:
            bias_ptr = k_bias_ptr
    else:
        w_ptr = v_weight_ptr
        y_ptr = v_ptr
        stride_wn = stride_vn
        num_columns = kv_columns
        tile_n -= q_tiles + kv_tiles
        if HAS_BIAS:
            bias_ptr = v_bias_ptr
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
    mask = (offs_m < num_rows)[:, None] & (offs_n < num_columns)[None, :]
    y_ptrs = y_ptr + rows[:, None] * num_columns + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def qkv_linear(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    v_bias: torch.Tensor | None = None,
    *,
    config: MatmulConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project x to queries, keys and values with one Triton launch.

    Args:
        x: [T, D], float32, float16 or bfloat16; rows may be strided, T may be 0.
        q_weight: [H*E, D], as nn.Linear holds it.
        k_weight: [K*E, D].
        v_weight: [K*E, D].
        q_bias: [H*E]; the three biases are given together or not at all.
        k_bias: [K*E].
        v_bias: [K*E].
        config: tile to use instead of the heuristic's.

    Returns:
        q [T, H*E], k [T, K*E], v [T, K*E], new and contiguous, in x's dtype.

    Raises:
        KernelArgumentError: shapes, dtypes, devices or strides do not fit, or Triton can't run
            on x's device in this process.
    """
    num_rows, depth, q_columns, kv_columns = _check(
        x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias
    )
    check_launchable("qkv_linear", x.device)
    q = x.new_empty(num_rows, q_columns)
    k = x.new_empty(num_rows, kv_columns)
    v = x.new_empty(num_rows, kv_columns)
    if num_rows == 0:
        return q, k, v
    if config is None:
        config = matmul_config(
            num_rows, q_columns + 2 * kv_columns, depth, x.dtype, device_arch(x.device)
        )
    tiles_n = triton.cdiv(q_columns, config.block_n) + 2 * triton.cdiv(kv_columns, config.block_n)
    _qkv_linear_kernel[(triton.cdiv(num_rows, config.block_m) * tiles_n,)](
        x,
        q_weight,
        k_weight,
        v_weight,
        q_bias,
        k_bias,
        v_bias,
        q,
        k,
        v,
        num_rows,
        q_columns,
        kv_columns,
        depth,
        x.stride(0),
        q_weight.stride(0),
        k_weight.stride(0),
        v_weight.stride(0),
        **config.constants(depth, num_rows),
        HAS_BIAS=q_bias is not None,
        **config.options,
        **decode_options(x.device),
    )
    return q, k, v


def qkv_linear_ref(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    v_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the same as :func:`qkv_linear` with torch, on any device; see there."""
    return (
        host_linear(x, q_weight, q_bias),
        host_linear(x, k_weight, k_bias),
        host_linear(x, v_weight, v_bias),
    )


def _check(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    v_bias: torch.Tensor | None,
) -> tuple[int, int, int, int]:
    """Check the operands and return (T, D, H*E, K*E)."""
    op = "qkv_linear"
    check_operands(
        op,
        x=x,
        q_weight=q_weight,
        k_weight=k_weight,
        v_weight=v_weight,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
    )
    check_rank(op, "x", x, 2, "[T, D]")
    check_rank(op, "q_weight", q_weight, 2, "[H*E, D]")
    check_rank(op, "k_weight", k_weight, 2, "[K*E, D]")
    num_rows, depth = x.shape
    q_columns, kv_columns = q_weight.shape[0], k_weight.shape[0]
    check_shape(op, "q_weight", q_weight, (q_columns, depth))
    check_shape(op, "k_weight", k_weight, (kv_columns, depth))
    check_shape(op, "v_weight", v_weight, (kv_columns, depth))
    num_biases = (q_bias is not None) + (k_bias is not None) + (v_bias is not None)
    require(
        num_biases in (0, 3),
        f"{op}: the biases come together",
        "all three or none",
        f"{num_biases} of them",
        "Pass zeros for the missing ones.",
    )
    for name, bias, size in (
        ("q_bias", q_bias, q_columns),
        ("k_bias", k_bias, kv_columns),
        ("v_bias", v_bias, kv_columns),
    ):
        if bias is not None:
            check_shape(op, name, bias, (size,))
    return num_rows, depth, q_columns, kv_columns


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches of Llama-3.1-8B, Qwen2.5-7B (bias), Qwen3-0.6B and SmolLM2-135M."""
    biases = ("q_bias_ptr", "k_bias_ptr", "v_bias_ptr")
    for label, depth, q_columns, kv_columns, has_bias, rows in (
        ("llama-3.1-8b", 4096, 4096, 1024, False, AUDIT_ROWS),
        ("qwen2.5-7b", 3584, 3584, 512, True, AUDIT_ROWS_VARIANT),
        ("qwen3-0.6b", 1024, 2048, 1024, False, AUDIT_ROWS_SMALL),
        ("smollm2-135m", 576, 576, 192, False, AUDIT_ROWS_SMALL),
    ):
        for num_rows, dtype in rows:
            config = matmul_config(num_rows, q_columns + 2 * kv_columns, depth, dtype, arch)
            bias = dtype if has_bias else None
            yield LaunchCase(
                op="qkv_linear",
                label=f"{label} T={num_rows} {dtype}",
                kernel=_qkv_linear_kernel,
                args=(
                    *(dtype, dtype, dtype, dtype, bias, bias, bias, dtype, dtype, dtype),
                    *(num_rows, q_columns, kv_columns, depth, depth, depth, depth, depth),
                ),
                constants={**config.constants(depth, num_rows), "HAS_BIAS": has_bias, "PDL": False},
                options=config.options,
                mma=config.expected_mma(dtype, arch),
                streams=("x_ptr", "q_weight_ptr", "k_weight_ptr", "v_weight_ptr"),
                narrow=dict.fromkeys(biases, BIAS_READ) if has_bias else {},
            )
