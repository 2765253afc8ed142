"""Sample one token a row of processed logits by inverting the CDF, with its logprob."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from tritonhybrid_kernels.philox import ROW_COUNTER, philox_uniform_ref

# Length of the pieces of a row whose masses are summed first; their CDF and that of one piece
# together are far shorter than the row's.
_PIECE: Final = 128


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
