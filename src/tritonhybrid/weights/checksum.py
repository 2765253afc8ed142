"""Whether a module computes what it computed before: a mark of its weights and switches."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Final

import torch
from torch import nn

# Up to so many elements every one counts; of a larger tensor about _SAMPLE, evenly spread.
_WHOLE: Final = 1 << 16
_SAMPLE: Final = 1 << 11
_PLAIN = (bool, int, float, str, type(None))
# What a forward doesn't look at, or what a call of ours changes and puts back.
_IGNORED = {"training", "_is_full_backward_hook", "_is_hf_initialized"}


def checksum(module: nn.Module) -> Hashable:
    """A mark that differs once the module computes something else.

    It holds the version counter of each parameter, a weighted sum of its elements (of a large
    one a sample of them) and the plain attributes of each submodule, which switch adapters
    on and off. Only an edit through ``.data`` of a few elements of a large parameter leaves no
    trace in it. To be called without grad.

    Args:
        module: Whole parameters.
    """
    tensors = [*_tensors(module)]
    weights = torch.arange(_WHOLE, device=tensors[0].device).float().cos()
    sums = torch.stack([_weighted_sum(tensor, weights) for tensor in tensors]).tolist()
    shapes = tuple((_version(t), t.dtype, tuple(t.shape)) for t in tensors)
    switches = tuple(
        (name, key, _frozen(value))
        for name, submodule in module.named_modules()
        for key, value in submodule.__dict__.items()
        if key not in _IGNORED and _is_plain(value)
    )
    return tuple(sums), shapes, switches


def _tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        # An empty one is partitioned, and no part of the decoder (or its arena would hold it).
        if id(tensor) not in seen and tensor.numel() and not tensor.is_meta:
            seen.add(id(tensor))
            yield tensor


def _version(tensor: torch.Tensor) -> int:
    """Of a parameter; a model's forward may write to its buffers what they hold already."""
    if not isinstance(tensor, nn.Parameter) or tensor.is_inference():
        return -1
    return tensor._version


def _weighted_sum(tensor: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if flat.numel() > _WHOLE:
        # Odd, so that the sample is not one column of a matrix.
        flat = flat[:: flat.numel() // _SAMPLE | 1]
    return torch.dot(flat.float(), weights[: flat.numel()].to(flat.device)).nan_to_num()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, _PLAIN) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(_frozen(item) for item in value)
    return value  # type: ignore[no-any-return]
