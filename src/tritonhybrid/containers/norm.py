"""An RMS norm whose weight is read raw, once its module is shown to compute just that.

    y = x / sqrt(mean(x^2) + eps) * (weight + offset)

A class name shows nothing: the module itself is held against the formula, with a weight that
no training has made yet, so that a formula which agrees only at the present weight is noticed.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import nn

from tritonhybrid.containers.misfits import MISFITS
from tritonhybrid.containers.projection import is_plain

_TOLERANCE = 1e-5


def norm_eps(norm: nn.Module) -> float | None:
    """What a norm calls its epsilon; None where it has no weight or no epsilon."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if eps is None or getattr(norm, "weight", None) is None else float(eps)


def is_rms_norm(norm: nn.Module, eps: float, weight_offset: float) -> bool:
    """Whether a module is an RMS norm of its one parameter and of nothing else.

    Runs a copy of the module on a few rows in fp32 with a weight of ours, and leaves the module
    alone; reads the result on the host.

    Args:
        norm: Its weight is whole, on the device where it computes.
        eps: What a container would add to the mean square.
        weight_offset: What a container would add to the weight.
    """
    has_state = [name for name, _ in norm.named_parameters()] != ["weight"] or any(
        True for _ in (*norm.buffers(), *norm.children())
    )
    if has_state or not is_plain(norm):
        return False
    weight: torch.Tensor = norm.weight  # type: ignore[assignment]
    try:
        return _computes_rms_norm(norm, weight, eps, weight_offset)
    except MISFITS:
        return False


@torch.no_grad()
def _computes_rms_norm(
    norm: nn.Module, theirs: torch.Tensor, eps: float, weight_offset: float
) -> bool:
    generator = torch.Generator().manual_seed(0)
    width = theirs.shape[-1]
    weight = torch.randn(width, generator=generator).to(theirs.device)
    # Epsilon shows in small rows alone, a clamp or a cap in large ones.
    size = torch.tensor([[max(eps, 1e-12) ** 0.5], [1.0], [1e3]])
    x = (torch.randn(3, width, generator=generator) * size).to(theirs.device)
    twin = copy(norm)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    y = twin(x.clone().unsqueeze(0)).squeeze(0)
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    expected = expected * (weight.double() + weight_offset)
    distance = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return y.shape == x.shape and bool((distance <= _TOLERANCE).all())
