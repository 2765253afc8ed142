"""Normalise and rotate query and key heads and write keys and values into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_kv_write_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    """Do in torch what :func:`rope_kv_write` does; `k` is rotated in place too.

    With tables in the dtype of q the result has the bits of HF's ``apply_rotary_pos_emb``; with
    fp32 tables the rotation is computed in fp32 and rounded once.
    """
    if q.shape[0] == 0:
        return
    if q_norm_weight is not None:
        q.copy_(_head_rms_norm(q, q_norm_weight, norm_eps))
    if k_norm_weight is not None:
        k = _head_rms_norm(k, k_norm_weight, norm_eps)
    if cos is not None and sin is not None:
        cos_t = cos.index_select(0, positions).unsqueeze(1)
        sin_t = sin.index_select(0, positions).unsqueeze(1)
        # rotate_half(x) * sin = cat(-x2, x1) * sin = cat(x2, x1) * cat(-sin1, sin2): negation is
        # exact, so it can sit in the small table instead of the heads.
        sin_t[..., : sin_t.shape[-1] // 2].neg_()
        _rotate_(q, cos_t, sin_t)
        _rotate_(k, cos_t, sin_t)
    num_blocks, block_size, num_kv_heads, head_dim = k_cache.shape
    slots = num_blocks * block_size
    # A list of host memory on the CPU, where the copies below refuse negative indices. On a
    # device this waits for it: there the kernel is the path that reads nothing.
    if min(slot_mapping.tolist()) < 0:
        kept = (slot_mapping >= 0).nonzero().squeeze(1)
        slot_mapping = slot_mapping[kept]
        k, v = k[kept], v[kept]
    k_cache.view(slots, num_kv_heads, head_dim).index_copy_(0, slot_mapping, k)
    v_cache.view(slots, num_kv_heads, head_dim).index_copy_(0, slot_mapping, v)


def _head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """HF's RMS norm over the last dimension: fp32 inside, rounded, then times the weight."""
    x_fp32 = x.float()
    scale = x_fp32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return weight * x_fp32.mul_(scale).to(x.dtype)


def _rotate_(x: Tensor, cos: Tensor, signed_sin: Tensor) -> None:
    """Rotate the first ``cos.shape[-1]`` dims of each head of x [T, heads, E] in place."""
    rotary_dim = cos.shape[-1]
    if rotary_dim != x.shape[-1]:
        x = x[..., :rotary_dim]
    first, second = x.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    if cos.dtype == x.dtype:
        x.mul_(cos).add_(swapped.mul_(signed_sin))
    else:
        x.copy_(x * cos + swapped * signed_sin)
