"""Weights that lie one after the other in memory, seen as the one matrix that they form."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import nn

from tritonhybrid.containers.description import NotDescribableError, describe

# Projections of one input, which one matrix product can serve.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def joined(*tensors: torch.Tensor) -> torch.Tensor | None:
    """View exact neighbours as one tensor; None where they are not.

    No memory is copied: what is written through the view shows in the tensors. ZeRO-3's
    arena places q, k, v and gate, up so; the flat buffers of ZeRO 1 and 2 often do.

    Args:
        tensors: ``[N_i, ...]`` in the order wanted, weights ``[N_i, D]`` or biases ``[N_i]``.

    Returns:
        ``[sum N_i, ...]`` without gradient; None unless the tensors are contiguous, follow one
        another without a gap in one storage, and share dtype and row shape.
    """
    first = tensors[0]
    storage = first.untyped_storage()
    offset = first.storage_offset()
    for tensor in tensors:
        is_next = (
            tensor.ndim > 0
            and tensor.numel() > 0
            and tensor.dtype == first.dtype
            and tensor.shape[1:] == first.shape[1:]
            and tensor.is_contiguous()
            and tensor.untyped_storage().data_ptr() == storage.data_ptr() != 0
            and tensor.storage_offset() == offset
        )
        if not is_next:
            return None
        offset += tensor.numel()
    if offset * first.element_size() > storage.nbytes():
        return None
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def neighbours(layers: Iterable[nn.Module]) -> list[list[nn.Parameter]]:
    """Parameters that :func:`joined` should find side by side, where memory is laid out anew.

    Args:
        layers: Decoder layers; parameters may be partitioned.

    Returns:
        Per described layer the weights of q, k, v, their biases, and the same of gate, up.
    """
    groups: list[list[nn.Parameter]] = []
    for layer in layers:
        try:
            description = describe(layer)
            together = [
                [attrgetter(getattr(description, name))(layer) for name in names]
                for names in _TOGETHER
            ]
        except (NotDescribableError, AttributeError, TypeError):
            continue
        for modules in together:
            for kind in ("weight", "bias"):
                found = [getattr(module, kind, None) for module in modules]
                group = [tensor for tensor in found if isinstance(tensor, nn.Parameter)]
                if len(group) == len(modules):
                    groups.append(group)
    return groups
