"""A persistent copy of partitioned parameters, at addresses that never move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

# Views start on a boundary that vector loads and TMA descriptors like.
_ALIGN_BYTES = 256

Groups = Sequence[Sequence[nn.Parameter]]


class Arena:
    """One flat buffer per dtype and device, a view of it for each parameter.

    The parameters of a group lie side by side without a gap, in the group's order,
    whatever the order their modules registered them in. Every group, and every
    parameter outside of groups, starts on a boundary of 256 bytes.

    Args:
        parameters: ZeRO-3 parameters, each once; ``ds_shape`` is read, data is not.
        groups: Some of them. A group of several dtypes or devices, or with a parameter
            that an earlier one holds, is none.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Groups = ()) -> None:
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        places = []
        for block in _blocks(parameters, groups):
            kind = (block[0].dtype, block[0].device)
            start = sizes.get(kind, 0)
            for parameter in block:
                places.append((parameter, kind, start))
                start += full_shape(parameter).numel()
            step = _ALIGN_BYTES // kind[0].itemsize
            sizes[kind] = -(-start // step) * step
        self._buffers = {
            kind: torch.empty(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()
        }
        self._views = {
            id(parameter): self._buffers[kind][start:][: full_shape(parameter).numel()].view(
                full_shape(parameter)
            )
            for parameter, kind, start in places
        }
        self._parameters = _identity(parameters)
        self._groups = [[id(p) for p in group] for group in groups]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def holds(self, parameters: Sequence[nn.Parameter], groups: Groups = ()) -> bool:
        """Whether it was laid out for exactly these parameters, and for these groups if any."""
        return self._parameters == _identity(parameters) and (
            not groups or self._groups == [[id(p) for p in group] for group in groups]
        )

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


def _blocks(parameters: Sequence[nn.Parameter], groups: Groups) -> Iterator[Sequence[nn.Parameter]]:
    """What lies side by side: each group at its first parameter's turn, the others alone."""
    home: dict[int, Sequence[nn.Parameter]] = {}
    for group in groups:
        ids = {id(parameter) for parameter in group}
        is_alike = len({(p.dtype, p.device) for p in group}) == 1
        if is_alike and len(ids) == len(group) and ids.isdisjoint(home):
            home.update((id(parameter), group) for parameter in group)
    placed: set[int] = set()
    for parameter in parameters:
        if id(parameter) not in placed:
            block = home.get(id(parameter), [parameter])
            placed.update(id(p) for p in block)
            yield block


def _identity(
    parameters: Sequence[nn.Parameter],
) -> list[tuple[int, torch.Size, torch.dtype]]:
    return [(id(p), full_shape(p), p.dtype) for p in parameters]
