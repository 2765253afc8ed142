"""Counter-based random numbers: Philox-4x32-10 keyed by row, counted by vocabulary id.

A draw is a pure function of (key, c0, c1, c2, c3), so a token does not depend on the batch it
was sampled in. The uniform of a 32-bit word x is ``(fp32(min(x, 2**32 - 129)) + 0.5) * 2**-32``:
strictly inside (0, 1), spaced ``2**-32`` near 0 and ``2**-24`` near 1.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

# c0 of a row's single uniform (inverse CDF): no vocabulary id.
ROW_COUNTER: Final = 0xFFFFFFFF

_WORD: Final = 0xFFFFFFFF
# The largest word whose fp32 value lies below 2**32, so that no uniform is 1.
_LARGEST_WORD: Final = 0xFFFFFF7F
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS: Final = 10


@triton.jit
def philox_uniform(key, c0, c1, c2, c3):
    """Draw a uniform in (0, 1) from a 64-bit key and four counter words, broadcast."""
    word, _, _, _ = tl.philox(
        key, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    )
    word = tl.minimum(word, 0xFFFFFF7F)
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(uniform):
    """Turn a uniform into Gumbel noise -log(-log(1 - u)), accurate where u is near 0."""
    rest = 1.0 - uniform
    # Kahan's log1p: the rounding of 1 - u is the same in log and divisor, and cancels.
    exponential = -tl.log(rest) * (uniform / (1.0 - rest))
    return -tl.log(tl.where(rest == 1.0, uniform, exponential))


def philox_uniform_ref(
    keys: Tensor, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> Tensor:
    """Draw one uniform in (0, 1) a counter, in torch integer arithmetic.

    Args:
        keys: int64, the 64-bit key (low word first), broadcast against the counters.
        c0: lowest counter word, int64 tensor or int; bits above 32 are dropped, of all four.
        c1: second counter word.
        c2: third counter word.
        c3: highest counter word.

    Returns:
        fp32 of the broadcast shape, bit-equal to the kernels' ``philox_uniform``.
    """
    counters = torch.broadcast_tensors(
        keys, *(c if isinstance(c, Tensor) else keys.new_tensor(c) for c in (c0, c1, c2, c3))
    )
    # The four words as two pairs, so that a round is seven calls: even = (c0, c2), odd = (c1, c3).
    even = torch.stack((counters[1], counters[3])).bitwise_and_(_WORD)
    odd = torch.stack((counters[2], counters[4])).bitwise_and_(_WORD)
    pair = (2,) + (1,) * keys.dim()
    multipliers = keys.new_tensor(_MULTIPLIERS).view(pair)
    step = keys.new_tensor(_KEY_STEPS).view(pair)
    key = torch.stack((keys, keys >> 32)).bitwise_and_(_WORD)
    for _ in range(_NUM_ROUNDS):
        # The product of two words wraps as int64; its bits are right all the same.
        product = even.mul_(multipliers).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_WORD)
        odd = product.bitwise_and_(_WORD)
        key = (key + step).bitwise_and_(_WORD)
    return even[0].clamp_max_(_LARGEST_WORD).to(torch.float32).add_(0.5).mul_(2.0**-32)


def gumbel_from_uniform(uniform: Tensor) -> Tensor:
    """Turn uniforms in (0, 1) into standard Gumbel noise, ``-log(-log(1 - u))``.

    With 1 - u the fine spacing of u near 0 falls on the large noise that decides a draw.
    """
    return torch.log1p(-uniform).neg_().log_().neg_()
