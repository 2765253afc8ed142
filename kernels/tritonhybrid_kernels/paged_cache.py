"""The paged key and value cache and its block table: what the ops that use them share.

Layout: caches [N, S, K, E], N blocks of S slots; a block is contiguous, blocks may lie apart.
Sequence b's token j is in block ``block_table[b, j // S]`` at slot ``j % S``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonhybrid_kernels.launch import check_operands, check_rank, check_shape, require


def check_paged_cache(op: str, k_cache: Tensor, v_cache: Tensor, head_dim: int) -> None:
    """Check that both caches are [N, S, K, E] of one shape with contiguous blocks.

    Raises:
        KernelArgumentError: they are not.
    """
    check_rank(op, "k_cache", k_cache, 4, "[N, S, K, E]")
    check_shape(op, "k_cache", k_cache, (*k_cache.shape[:3], head_dim))
    check_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(
            cache[:1].is_contiguous(),
            f"{op}: a block of {name} must be contiguous",
            "contiguous [S, K, E]",
            f"strides {cache.stride()}",
            "Allocate the cache as [N, S, K, E].",
        )


def check_heads(op: str, name: str, heads: Tensor) -> None:
    """Check that heads [T, heads, E] follow each other within a token; tokens may lie apart.

    Raises:
        KernelArgumentError: they do not.
    """
    require(
        heads.stride(1) == heads.shape[2] or heads.shape[1] == 1,
        f"{op}: the heads of {name} must follow each other",
        f"head stride {heads.shape[2]}",
        heads.stride(1),
        "View a row of the projection as [heads, E].",
    )


def check_index(
    op: str, name: str, index: Tensor, length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Check that `index` is a contiguous integer vector of `length` on `device`.

    Raises:
        KernelArgumentError: it is not.
    """
    check_shape(op, name, index, (length,))
    require(
        index.dtype == dtype and index.device == device and index.is_contiguous(),
        f"{op}: {name} must be contiguous and beside the operands",
        f"{dtype} on {device}",
        f"{index.dtype} on {index.device}",
        f"Build it with dtype={dtype} on that device.",
    )


def refuse_features(op: str, **features: Tensor | None) -> None:
    """Check that no feature is asked for that only the torch path has.

    Raises:
        KernelArgumentError: one is; the message names it.
    """
    for name, feature in features.items():
        require(
            feature is None,
            f"{op}: {name} has no Triton kernel yet",
            None,
            type(feature).__name__,
            f"Run the torch path: select_ops('triton', torch_ops=frozenset({{'{op}'}})).",
        )


def check_attention(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """Check what the launchers of prefill and decode attention share.

    Raises:
        KernelArgumentError: a shape, dtype, device, stride or number is not as their docstrings
            say; the message names it.
    """
    check_operands(op, q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    check_rank(op, "q", q, 3, "[tokens, H, E]")
    check_heads(op, "q", q)
    check_paged_cache(op, k_cache, v_cache, q.shape[2])
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[2]
    require(
        num_heads % num_kv_heads == 0,
        f"{op}: each KV head serves as many query heads",
        f"H a multiple of {num_kv_heads}",
        num_heads,
        "Check the head counts of the model's config.",
    )
    check_rank(op, "block_table", block_table, 2, "[B, MB]")
    require(
        block_table.dtype == torch.int32
        and block_table.device == q.device
        and block_table.stride(1) == 1,
        f"{op}: block_table must be int32 with contiguous rows beside q",
        f"int32 on {q.device}",
        f"{block_table.dtype} on {block_table.device} with strides {block_table.stride()}",
        "Build it as [B, MB] int32.",
    )
    check_index(op, "context_lens", context_lens, block_table.shape[0], torch.int32, q.device)
    require(
        window is None or window >= 1,
        f"{op}: a window holds the query's own position at least",
        "None or >= 1",
        window,
        "Pass None for full attention.",
    )
    require(
        softcap is None or softcap > 0,
        f"{op}: softcap must be positive",
        "None or > 0",
        softcap,
        "Pass None for uncapped scores.",
    )
    if out is not None:
        check_shape(op, "out", out, tuple(q.shape))
        require(
            out[:1].is_contiguous(),
            f"{op}: the heads of out must follow each other",
            "contiguous [H, E]",
            f"strides {out.stride()}",
            "Allocate out as [tokens, H, E].",
        )


def attention_numbers(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    out: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[int | float, ...]:
    """Return strides, scale, softcap and window, as the kernels of both attentions take them."""
    return (
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        block_table.stride(0),
        out.stride(0),
        scale,
        softcap or 0.0,
        window or 0,
    )
