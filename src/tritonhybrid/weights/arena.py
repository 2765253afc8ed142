"""A persistent copy of partitioned parameters, at addresses that never move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Views start on a boundary that vector loads and TMA descriptors like.
_ALIGN_BYTES = 256


class Arena:
    """One flat buffer per dtype and device, a view of it for each parameter.

    The views lie in the order of ``parameters``, so q, k, v (and gate, up), which
    modules register one after the other, are neighbours.

    Args:
        parameters: ZeRO-3 parameters, each once; ``ds_shape`` is read, data is not.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        places = []
        for parameter in parameters:
            kind = (parameter.dtype, parameter.device)
            start = sizes.get(kind, 0)
            step = _ALIGN_BYTES // parameter.dtype.itemsize
            numel = full_shape(parameter).numel()
            sizes[kind] = start + -(-numel // step) * step
            places.append((kind, start, numel))
        self._buffers = {
            kind: torch.empty(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()
        }
        self._views = {
            id(parameter): self._buffers[kind][start : start + numel].view(full_shape(parameter))
            for parameter, (kind, start, numel) in zip(parameters, places, strict=True)
        }
        self._key = _key(parameters)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def holds(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether it was laid out for exactly these parameters."""
        return self._key == _key(parameters)

    def store(self, parameters: Sequence[nn.Parameter]) -> None:
        """Copy whole parameters into their places."""
        for parameter in parameters:
            self.view(parameter).copy_(parameter.data)

    def view(self, parameter: nn.Parameter) -> torch.Tensor:
        """The parameter's place, of its full shape."""
        return self._views[id(parameter)]


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that may be partitioned."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _key(parameters: Sequence[nn.Parameter]) -> tuple[tuple[int, torch.Size, torch.dtype], ...]:
    return tuple((id(p), full_shape(p), p.dtype) for p in parameters)
