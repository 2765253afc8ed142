"""Output projection, sampling and logprobs in one pass over the vocabulary, without logits."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonhybrid_kernels.philox import gumbel_from_uniform, philox_uniform_ref

_NOISE_SLICE: Final = 2048


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
