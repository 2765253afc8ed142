"""Soft capping of scores and logits, ``cap * tanh(x / cap)``, without libdevice."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softcap_fp32(x, cap):
    """Cap fp32 x smoothly to (-cap, cap); relative error below 1e-6 everywhere."""
    scaled = x / cap
    size = tl.abs(scaled)
    # exp(-2 |x|) never overflows; near 0, where 1 - exp cancels, the odd series to x**9.
    decay = tl.exp2(size * -2.8853900817779268)
    far = (1.0 - decay) / (1.0 + decay)
    square = size * size
    series = 0.05396825396825397 - square * 0.021869488536155203
    series = 0.13333333333333333 - square * series
    near = size - size * square * (0.3333333333333333 - square * series)
    tanh = tl.where(size < 0.25, near, far)
    return cap * tl.where(scaled < 0, -tanh, tanh)
