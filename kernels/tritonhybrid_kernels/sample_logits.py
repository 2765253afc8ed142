"""Sample one token a row of processed logits by inverting the CDF, with its logprob.

    token = min {t : sum_{s <= t} p[s] > u},   p = softmax(logits),   u = philox(key, position, uid)

Two launches: the first reduces each tile of a row to its maximum and its mass; the second finds the
tile where the CDF passes u, or that of the row's maximum, and the token within that tile. The
logits are read once, and one tile of them twice. One uniform a row is all the randomness: a row's
token depends on its logits, key, position and uid, not on the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.dependent_launch import await_predecessor
from tritonhybrid_kernels.launch import (
    LaunchCase,
    NarrowRead,
    check_last_stride,
    check_launchable,
    check_rank,
    decode_options,
    require,
)
from tritonhybrid_kernels.paged_cache import check_index
from tritonhybrid_kernels.philox import ROW_COUNTER, philox_uniform, philox_uniform_ref

# Logits a program reduces: 8 to each of 256 threads.
_TILE: Final = 2048
_NUM_WARPS: Final = 8

# Length of the pieces of a row whose masses the torch path sums first; their CDF and that of one
# piece together are far shorter than the row's.
_PIECE: Final = 128


@triton.jit
def _tile_stats_kernel(
    logits_ptr,  # [B, V]
    maximum_ptr,  # [B, num_tiles] fp32
    mass_ptr,  # [B, num_tiles] fp32, sum of exp(logit - maximum)
    vocab_size,
    stride_lb,
    num_tiles,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        await_predecessor()
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    offs = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(
        logits_ptr + row * stride_lb + offs, mask=offs < vocab_size, other=float("-inf")
    )
    maximum = tl.max(logits, axis=0)
    # A tile of masked tokens has the maximum -inf, and -inf - -inf is NaN.
    mass = tl.sum(tl.exp(logits - tl.where(maximum == float("-inf"), 0.0, maximum)), axis=0)
    out = row * num_tiles + tile
    tl.store(maximum_ptr + out, maximum)
    tl.store(mass_ptr + out, mass)


@triton.jit
def _invert_cdf_kernel(
    logits_ptr,  # [B, V]
    maximum_ptr,  # [B, num_tiles] fp32
    mass_ptr,  # [B, num_tiles] fp32
    keys_ptr,  # [B] int64
    uids_ptr,  # [B] int64
    positions_ptr,  # [B] int64
    greedy_ptr,  # [B] bool
    tokens_ptr,  # [B] int64
    logprobs_ptr,  # [B] fp32
    vocab_size,
    stride_lb,
    num_tiles,
    ROW_COUNTER: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        await_predecessor()
    row = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tiles
    tiles = row * num_tiles + offs_t
    maxima = tl.load(maximum_ptr + tiles, mask=mask_t, other=float("-inf"))
    row_max, best_tile = tl.max(
        maxima, axis=0, return_indices=True, return_indices_tie_break_left=True
    )
    masses = tl.load(mass_ptr + tiles, mask=mask_t, other=0.0) * tl.exp(maxima - row_max)
    total = tl.sum(masses, axis=0)
    uid = tl.load(uids_ptr + row)
    counter = tl.full((1,), ROW_COUNTER, tl.uint32)
    position = tl.load(positions_ptr + row)
    uniform = philox_uniform(tl.load(keys_ptr + row), counter, position, uid, uid >> 32)
    target = tl.sum(uniform, axis=0) * total
    # A parallel scan may fall back by a rounding, so tokens without mass are excluded by name;
    # where rounding leaves no candidate, the last one with mass ends the CDF.
    cdf = tl.cumsum(masses, axis=0)
    has_mass = masses > 0
    tile = tl.min(tl.where(has_mass & (cdf > target), offs_t, BLOCK_T), axis=0)
    tile = tl.where(tile < BLOCK_T, tile, tl.max(tl.where(has_mass, offs_t, 0), axis=0))
    before = tl.sum(tl.where(offs_t < tile, masses, 0.0), axis=0)
    is_greedy = tl.load(greedy_ptr + row)
    tile = tl.where(is_greedy, best_tile, tile)
    offs = tl.arange(0, TILE)
    ids = tile * TILE + offs
    logits = tl.load(logits_ptr + row * stride_lb + ids, mask=ids < vocab_size, other=float("-inf"))
    _, best = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
    weights = tl.exp(logits - row_max)
    cdf = before + tl.cumsum(weights, axis=0)
    has_mass = weights > 0
    found = tl.min(tl.where(has_mass & (cdf > target), offs, TILE), axis=0)
    found = tl.where(found < TILE, found, tl.max(tl.where(has_mass, offs, 0), axis=0))
    found = tl.where(is_greedy, best, found)
    logit = tl.sum(tl.where(offs == found, logits, 0.0), axis=0)
    tl.store(tokens_ptr + row, (tile * TILE + found).to(tl.int64))
    tl.store(logprobs_ptr + row, logit - row_max - tl.log(total))


def sample_logits(
    logits: Tensor, keys: Tensor, uids: Tensor, positions: Tensor, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample one token a row, or take the best, and return its logprob.

    Args:
        logits: [B, V] fp32 after temperature and filters; masked tokens are -inf, one token a
            row at least is finite.
        keys: [B] int64 philox key of a row, mixed from seed and sample index by the caller.
        uids: [B] int64 of the sequences; counter words 2 and 3.
        positions: [B] int64 of the sampled tokens; counter word 1.
        greedy: [B] bool, rows that take the largest logit, the lowest id on ties.

    Returns:
        Tokens [B] int64, never one of probability 0, and their log softmax [B] fp32.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride is not as above.
    """
    op = "sample_logits"
    check_rank(op, "logits", logits, 2, "[B, V]")
    check_last_stride(op, "logits", logits)
    batch, vocab_size = logits.shape
    require(
        logits.dtype == torch.float32 and vocab_size > 0,
        f"{op}: logits must be float32 over a vocabulary",
        "float32 [B, V], V > 0",
        f"{logits.dtype} {list(logits.shape)}",
        "Cast the logits: sampling in half precision would merge tokens.",
    )
    for name, index in (("keys", keys), ("uids", uids), ("positions", positions)):
        check_index(op, name, index, batch, torch.int64, logits.device)
    check_index(op, "greedy", greedy, batch, torch.bool, logits.device)
    device = logits.device
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    logprobs = torch.empty(batch, dtype=torch.float32, device=device)
    if batch == 0:
        return tokens, logprobs
    check_launchable(op, device)
    num_tiles = triton.cdiv(vocab_size, _TILE)
    maximum, mass = torch.empty((2, batch, num_tiles), dtype=torch.float32, device=device)
    _tile_stats_kernel[(batch, num_tiles)](
        logits,
        maximum,
        mass,
        vocab_size,
        logits.stride(0),
        num_tiles,
        TILE=_TILE,
        num_warps=_NUM_WARPS,
        **decode_options(device),
    )
    _invert_cdf_kernel[(batch,)](
        logits,
        maximum,
        mass,
        keys,
        uids,
        positions,
        greedy,
        tokens,
        logprobs,
        vocab_size,
        logits.stride(0),
        num_tiles,
        **_invert_constants(num_tiles),
        num_warps=_NUM_WARPS,
        **decode_options(device),
    )
    return tokens, logprobs


def _invert_constants(num_tiles: int) -> dict[str, Any]:
    return {
        "ROW_COUNTER": ROW_COUNTER,
        "TILE": _TILE,
        "BLOCK_T": triton.next_power_of_2(num_tiles),
    }


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches the offline audit compiles for an architecture (80 for sm_80)."""
    del arch
    fp32, int64 = torch.float32, torch.int64
    for vocab_size in (32000, 50257, 128256, 151936):
        num_tiles = triton.cdiv(vocab_size, _TILE)
        has_aligned_rows = vocab_size % 16 == 0
        unaligned = NarrowRead(32, f"rows of {vocab_size} float32 start at no 16 bytes")
        per_tile = NarrowRead(32, f"{num_tiles} tiles are less than a number a thread")
        streams = ("logits_ptr",) if has_aligned_rows else ()
        narrow = {} if has_aligned_rows else {"logits_ptr": unaligned}
        yield LaunchCase(
            op="sample_logits",
            label=f"tile stats V={vocab_size}",
            kernel=_tile_stats_kernel,
            args=(fp32, fp32, fp32, vocab_size, vocab_size, num_tiles),
            constants={"TILE": _TILE, "PDL": False},
            options={"num_warps": _NUM_WARPS},
            mma="none",
            streams=streams,
            narrow=narrow,
        )
        rows = (int64, int64, int64, torch.bool, int64, fp32)
        yield LaunchCase(
            op="sample_logits",
            label=f"inverse CDF V={vocab_size}",
            kernel=_invert_cdf_kernel,
            args=(fp32, fp32, fp32, *rows, vocab_size, vocab_size, num_tiles),
            constants={**_invert_constants(num_tiles), "PDL": False},
            options={"num_warps": _NUM_WARPS},
            mma="none",
            streams=streams,
            narrow={**narrow, "maximum_ptr": per_tile, "mass_ptr": per_tile},
        )


def sample_logits_ref(
    logits: Tensor, keys: Tensor, uids: Tensor, positions: Tensor, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """Do in torch what :func:`sample_logits` does.

    The CDF is inverted in two steps, over pieces of 128 tokens and within one piece.
    """
    # Every search over a row is one over its pieces and one within a piece: far fewer calls of
    # the slow index reductions and no CDF as long as the row.
    row_max, best_piece = _per_piece(logits, Tensor.amax).max(-1, keepdim=True)
    best_in_piece = _take_piece(logits, best_piece, float("-inf")).argmax(-1)
    if bool(greedy.all()):
        # logsumexp would look for the maximum again.
        log_total = (logits - row_max).exp_().sum(1).log_()
        return best_piece.squeeze(1) * _PIECE + best_in_piece, log_total.neg_()
    weights = (logits - row_max).exp_()
    # fp64 over the few pieces: the target stays below the total for every uniform.
    cdf = _per_piece(weights, Tensor.sum).double().cumsum(-1)
    total = cdf[:, -1:]
    uniform = philox_uniform_ref(keys, ROW_COUNTER, positions, uids, uids >> 32)
    target = total * uniform.unsqueeze(1)
    piece = (cdf <= target).sum(-1, keepdim=True)
    before = torch.cat((torch.zeros_like(total), cdf), 1).gather(1, piece)
    cdf_in_piece = _take_piece(weights, piece, 0.0).double().cumsum(-1)
    # The piece's mass was rounded to fp32, so the target may pass the sum of its tokens: then the
    # last token with mass, where the CDF reaches its end.
    passed = (cdf_in_piece <= target - before).sum(-1)
    last = (cdf_in_piece < cdf_in_piece[:, -1:]).sum(-1)
    in_piece = best_in_piece.where(greedy, torch.minimum(passed, last))
    tokens = torch.where(greedy, best_piece.squeeze(1), piece.squeeze(1)) * _PIECE + in_piece
    logprobs = logits.gather(1, tokens.unsqueeze(1)) - row_max - total.log().float()
    return tokens, logprobs.squeeze(1)


def _per_piece(rows: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce each piece of rows [B, V] to one number [B, ceil(V / 128)]."""
    num_whole = rows.shape[1] // _PIECE
    whole = reduce(rows[:, : num_whole * _PIECE].unflatten(1, (num_whole, _PIECE)), -1)
    if num_whole * _PIECE == rows.shape[1]:
        return whole
    return torch.cat((whole, reduce(rows[:, num_whole * _PIECE :], -1, keepdim=True)), 1)


def _take_piece(rows: Tensor, piece: Tensor, fill: float) -> Tensor:
    """Copy piece number `piece` [B, 1] of each row: [B, 128], with `fill` past the row's end."""
    ids = piece * _PIECE + torch.arange(_PIECE, device=rows.device)
    taken = rows.gather(1, ids.clamp_max(rows.shape[1] - 1))
    return taken if rows.shape[1] % _PIECE == 0 else taken.masked_fill_(ids >= rows.shape[1], fill)
