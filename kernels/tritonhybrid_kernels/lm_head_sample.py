"""Output projection, sampling and logprobs in one pass over the vocabulary, without logits.

    z = hidden W^T (+ bias);  token = argmax_v (z[v] / temperature + g[v]),  g ~ Gumbel(0, 1)

The maximum of logits plus independent Gumbel noise is an exact sample of their softmax, and unlike
a CDF it needs no pass over all logits first: each tile of the vocabulary reduces to its best noisy
score, that token and its logit, the largest logit and the sums of exponentials with and without
temperature. A second kernel reduces the tiles. Noise is one philox draw a token id, so tiles and
batch have no part in it. The projection is computed transposed, weights as rows: a decode batch
fills the narrow side of the matrix instruction and the vocabulary the wide one.

Source: Maddison, Tarlow, Minka, "A* Sampling" (arXiv:1411.0030).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.dependent_launch import await_predecessor, prefetch_rows
from tritonhybrid_kernels.launch import (
    LaunchCase,
    Mma,
    NarrowRead,
    check_launchable,
    check_operands,
    check_rank,
    check_shape,
    decode_options,
    require,
)
from tritonhybrid_kernels.paged_cache import check_index
from tritonhybrid_kernels.philox import (
    gumbel,
    gumbel_from_uniform,
    philox_uniform,
    philox_uniform_ref,
)
from tritonhybrid_kernels.softcap import softcap_fp32

# Numbers a tile of the vocabulary reduces to: see _tile_kernel.
_NUM_STATS: Final = 5

# Token ids the torch path draws noise for at a time.
_NOISE_SLICE: Final = 2048


@triton.jit(do_not_specialize=["batch"])
def _tile_kernel(
    hidden_ptr,  # [B, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    temperature_ptr,  # [B] fp32
    keys_ptr,  # [B] int64
    uids_ptr,  # [B] int64
    positions_ptr,  # [B] int64
    stats_ptr,  # [5, B, tiles] fp32: best score, its logit, maximum, scaled mass, raw mass
    best_ptr,  # [B, tiles] int32
    batch,
    vocab_size,
    depth,
    stride_hb,
    stride_wv,
    stride_sb,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    offs_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_b = offs_b < batch
    mask_v = offs_v < vocab_size
    # Rows out of range read row 0: their results are masked below.
    rows_b = tl.where(mask_b, offs_b, 0).to(tl.int64)
    rows_v = tl.where(mask_v, offs_v, 0).to(tl.int64)
    if PDL:
        prefetch_rows(weight_ptr, rows_v, stride_wv, depth, 512 // BLOCK_V)
        await_predecessor()
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = hidden_ptr + rows_b[None, :] * stride_hb + offs_k[:, None]
    w_ptrs = weight_ptr + rows_v[:, None] * stride_wv + offs_k[None, :]
    acc = tl.zeros((BLOCK_V, BLOCK_B), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(offs_k < depth - k)[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=(offs_k < depth - k)[None, :], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows_v)[:, None].to(tl.float32)
    logits = acc.to(hidden_ptr.dtype.element_ty).to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        logits = softcap_fp32(logits, softcap)
    logits = tl.where(mask_v[:, None], logits, float("-inf"))

    maximum = tl.max(logits, axis=0)
    # Tokens may be masked by a bias of -inf, all of a tile's too: -inf - -inf is NaN.
    safe_maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    raw_mass = tl.sum(tl.exp(logits - safe_maximum[None, :]), axis=0)
    temperature = tl.load(temperature_ptr + offs_b, mask=mask_b, other=0.0)
    is_random = temperature > 0
    divisor = tl.where(is_random, temperature, 1.0)
    scores = logits / divisor[None, :]
    mass = tl.sum(tl.exp(scores - (safe_maximum / divisor)[None, :]), axis=0)
    if tl.max(temperature, axis=0) > 0:
        keys = tl.load(keys_ptr + offs_b, mask=mask_b, other=0)[None, :]
        uids = tl.load(uids_ptr + offs_b, mask=mask_b, other=0)[None, :]
        positions = tl.load(positions_ptr + offs_b, mask=mask_b, other=0)[None, :]
        uniform = philox_uniform(keys, offs_v[:, None], positions, uids, uids >> 32)
        scores += tl.where(is_random[None, :], gumbel(uniform), 0.0)
    score, best = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    is_best = tl.arange(0, BLOCK_V)[:, None] == best[None, :]
    logit = tl.sum(tl.where(is_best, logits, 0.0), axis=0)

    out = offs_b.to(tl.int64) * stride_sb + tile
    plane = batch.to(tl.int64) * stride_sb
    tl.store(stats_ptr + out, score, mask=mask_b)
    tl.store(stats_ptr + plane + out, logit, mask=mask_b)
    tl.store(stats_ptr + 2 * plane + out, maximum, mask=mask_b)
    tl.store(stats_ptr + 3 * plane + out, mass, mask=mask_b)
    tl.store(stats_ptr + 4 * plane + out, raw_mass, mask=mask_b)
    tl.store(best_ptr + out, tile * BLOCK_V + best, mask=mask_b)


@triton.jit(do_not_specialize=["batch"])
def _reduce_tiles_kernel(
    stats_ptr,  # [5, B, tiles] fp32
    best_ptr,  # [B, tiles] int32
    temperature_ptr,  # [B] fp32
    tokens_ptr,  # [B] int64
    logprobs_ptr,  # [B] fp32
    raw_logprobs_ptr,  # [B] fp32
    batch,
    num_tiles,
    stride_sb,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        await_predecessor()
    row = tl.program_id(0).to(tl.int64)
    plane = batch.to(tl.int64) * stride_sb
    offs = tl.arange(0, BLOCK_T)
    # The rows are padded to whole reads; what the padding holds is not looked at.
    mask = offs < stride_sb
    is_tile = offs < num_tiles
    tiles = row * stride_sb + offs
    scores = tl.where(is_tile, tl.load(stats_ptr + tiles, mask=mask), float("-inf"))
    logits = tl.load(stats_ptr + plane + tiles, mask=mask)
    maxima = tl.where(is_tile, tl.load(stats_ptr + 2 * plane + tiles, mask=mask), float("-inf"))
    masses = tl.where(is_tile, tl.load(stats_ptr + 3 * plane + tiles, mask=mask), 0.0)
    best = tl.load(best_ptr + tiles, mask=mask)
    raw_masses = tl.where(is_tile, tl.load(stats_ptr + 4 * plane + tiles, mask=mask), 0.0)
    _, tile = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    # Rows at hand are waited for once; a number at the best tile would be waited for after them.
    logit = tl.sum(tl.where(offs == tile, logits, 0.0), axis=0)
    temperature = tl.load(temperature_ptr + row)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    maximum = tl.max(maxima, axis=0)
    raw_total = tl.sum(raw_masses * tl.exp(maxima - maximum), axis=0)
    total = tl.sum(masses * tl.exp(maxima / divisor - maximum / divisor), axis=0)
    token = tl.sum(tl.where(offs == tile, best, 0), axis=0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(raw_logprobs_ptr + row, logit - maximum - tl.log(raw_total))
    tl.store(logprobs_ptr + row, logit / divisor - maximum / divisor - tl.log(total))


class HeadConfig(NamedTuple):
    """Tile sizes and compile options of the projection's launch."""

    block_b: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int


def head_config(batch: int, dtype: torch.dtype) -> HeadConfig:
    """Choose the tiles of a launch; more than 64 rows take several programs a tile."""
    block_b = min(64, max(16, triton.next_power_of_2(batch)))
    if dtype == torch.float32:
        return HeadConfig(min(block_b, 32), 64, 32, 4, 2)
    return HeadConfig(block_b, 128, 64, 4 if block_b <= 16 else 8, 4)


def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: Tensor,
    keys: Tensor,
    uids: Tensor,
    positions: Tensor,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token a row from the softmax of ``hidden W^T / temperature``.

    Args:
        hidden: [B, D] last hidden states, normed.
        weight: [V, D] of the output projection.
        bias: [V].
        temperature: [B] fp32, >= 0; 0 takes the largest logit, the lowest id on ties.
        keys: [B] int64 philox key of a row, mixed from seed and sample index by the caller.
        uids: [B] int64 of the sequences; counter words 2 and 3.
        positions: [B] int64 of the sampled tokens; counter word 1.
        logit_scale: factor of the logits, after they were rounded to the dtype of `hidden`.
        softcap: logits become ``softcap * tanh(logit / softcap)``, after the scale.

    Returns:
        Tokens [B] int64; their logprob [B] fp32 under the distribution sampled from (at
        temperature 1 where `temperature` is 0); their logprob [B] fp32 at temperature 1.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride is not as above.
    """
    op = "lm_head_sample"
    check_rank(op, "hidden", hidden, 2, "[B, D]")
    check_rank(op, "weight", weight, 2, "[V, D]")
    check_operands(op, hidden=hidden, weight=weight, bias=bias)
    batch, depth = hidden.shape
    vocab_size = weight.shape[0]
    check_shape(op, "weight", weight, (vocab_size, depth))
    if bias is not None:
        check_shape(op, "bias", bias, (vocab_size,))
    require(
        vocab_size > 0,
        f"{op}: there must be tokens to sample",
        "V > 0",
        vocab_size,
        "Pass the whole output projection.",
    )
    require(
        softcap is None or softcap > 0,
        f"{op}: softcap must be positive",
        "None or > 0",
        softcap,
        "Pass None for uncapped logits.",
    )
    device = hidden.device
    check_index(op, "temperature", temperature, batch, torch.float32, device)
    for name, index in (("keys", keys), ("uids", uids), ("positions", positions)):
        check_index(op, name, index, batch, torch.int64, device)
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    # Each its own memory: the results of an operator may not share any (library.py).
    logprobs = torch.empty(batch, dtype=torch.float32, device=device)
    raw_logprobs = torch.empty(batch, dtype=torch.float32, device=device)
    if batch == 0:
        return tokens, logprobs, raw_logprobs
    check_launchable(op, device)
    config = head_config(batch, hidden.dtype)
    num_tiles = triton.cdiv(vocab_size, config.block_v)
    stride_sb = _stats_stride(num_tiles)
    stats = torch.empty((_NUM_STATS, batch, stride_sb), dtype=torch.float32, device=device)
    best = torch.empty((batch, stride_sb), dtype=torch.int32, device=device)
    _tile_kernel[(num_tiles, triton.cdiv(batch, config.block_b))](
        hidden,
        weight,
        bias,
        temperature,
        keys,
        uids,
        positions,
        stats,
        best,
        batch,
        vocab_size,
        depth,
        hidden.stride(0),
        weight.stride(0),
        stride_sb,
        logit_scale,
        softcap or 0.0,
        **_constants(config, depth, bias is not None, softcap is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **decode_options(device),
    )
    _reduce_tiles_kernel[(batch,)](
        stats,
        best,
        temperature,
        tokens,
        logprobs,
        raw_logprobs,
        batch,
        num_tiles,
        stride_sb,
        BLOCK_T=triton.next_power_of_2(num_tiles),
        num_warps=4,
        **decode_options(device),
    )
    return tokens, logprobs, raw_logprobs


def _stats_stride(num_tiles: int) -> int:
    """Return the numbers from one row of tiles to the next: a multiple that Triton knows of."""
    return -(-num_tiles // 16) * 16


def _constants(
    config: HeadConfig, depth: int, has_bias: bool, has_softcap: bool
) -> dict[str, int | bool]:
    return {
        "HAS_BIAS": has_bias,
        "HAS_SOFTCAP": has_softcap,
        "BLOCK_B": config.block_b,
        "BLOCK_V": config.block_v,
        "BLOCK_K": config.block_k,
        "EVEN_K": depth % config.block_k == 0,
    }


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches the offline audit compiles for an architecture (80 for sm_80)."""
    bf16, fp32, int64 = torch.bfloat16, torch.float32, torch.int64
    for label, dtype, batch, vocab_size, depth, softcap in (
        ("llama-3.1-8b", bf16, 1, 128256, 4096, None),
        ("llama-3.1-8b", bf16, 32, 128256, 4096, None),
        ("llama-3.1-8b", bf16, 128, 128256, 4096, None),
        ("qwen3-0.6b", bf16, 16, 151936, 1024, None),
        ("smollm2-135m", bf16, 16, 49152, 576, None),
        ("gemma-2-9b", bf16, 16, 256000, 3584, 30.0),
        ("llama-3.2-1b fp32", fp32, 1, 128256, 2048, None),
        ("llama-3.2-1b fp32", fp32, 64, 128256, 2048, None),
    ):
        config = head_config(batch, dtype)
        num_tiles = triton.cdiv(vocab_size, config.block_v)
        mma: Mma = "none" if dtype == fp32 else "HGMMA" if arch >= 90 else "HMMA"
        per_row = "one number a row of a batch, beside V * D of the weight"
        yield LaunchCase(
            op="lm_head_sample",
            label=f"{label} B={batch}",
            kernel=_tile_kernel,
            args=(
                *(dtype, dtype, None, fp32, int64, int64, int64, fp32, torch.int32),
                *(batch, vocab_size, depth, depth, depth, _stats_stride(num_tiles)),
                *(1.0, softcap or 0.0),
            ),
            constants={**_constants(config, depth, False, softcap is not None), "PDL": False},
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            mma=mma,
            streams=("hidden_ptr", "weight_ptr"),
            narrow={
                "temperature_ptr": NarrowRead(32, per_row),
                "keys_ptr": NarrowRead(64, per_row),
                "uids_ptr": NarrowRead(64, per_row),
                "positions_ptr": NarrowRead(64, per_row),
            },
        )
    for num_tiles in (384, 1002, 2000):
        yield LaunchCase(
            op="lm_head_sample",
            label=f"reduce {num_tiles} tiles",
            kernel=_reduce_tiles_kernel,
            args=(
                *(fp32, torch.int32, fp32, int64, fp32, fp32),
                *(16, num_tiles, _stats_stride(num_tiles)),
            ),
            constants={"BLOCK_T": triton.next_power_of_2(num_tiles), "PDL": False},
            options={"num_warps": 4},
            mma="none",
            streams=("stats_ptr", "best_ptr"),
        )


def lm_head_sample_ref(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: Tensor,
    keys: Tensor,
    uids: Tensor,
    positions: Tensor,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do in torch what :func:`lm_head_sample` does, over materialised logits [B, V]."""
    logits = F.linear(hidden, weight, bias).float()
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    is_random = (temperature > 0).unsqueeze(1)
    divisor = temperature.unsqueeze(1).where(is_random, 1.0)
    scaled = logits / divisor
    noisy = scaled.clone()
    # Integer arithmetic in 64 bits takes several copies of what it works on: a slice at a time.
    for first in range(0, weight.shape[0], _NOISE_SLICE):
        part = noisy[:, first : first + _NOISE_SLICE]
        uniform = philox_uniform_ref(
            keys.unsqueeze(1),
            torch.arange(first, first + part.shape[1], device=hidden.device),
            positions.unsqueeze(1),
            uids.unsqueeze(1),
            (uids >> 32).unsqueeze(1),
        )
        part += gumbel_from_uniform(uniform).where(is_random, 0.0)
    tokens = noisy.argmax(-1, keepdim=True)
    logprobs = scaled.gather(1, tokens) - scaled.logsumexp(-1, keepdim=True)
    raw_logprobs = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
    return tokens.squeeze(1), logprobs.squeeze(1), raw_logprobs.squeeze(1)
