"""The key-value cache: pages of tokens, one pair of tensors a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tritonhybrid.block_manager import BlockCopy


@dataclass(frozen=True)
class LayerGeometry:
    """What one decoder layer keeps for a token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numel(self) -> int:
        """Elements a token takes in this layer, keys and values."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class PagedKVCache:
    """Keys ``[N, S, K, E]`` and values ``[N, S, K, E']`` of every layer, at fixed addresses.

    Args:
        geometry: One entry a decoder layer, in order.
        num_blocks: Pages (N).
        block_size: Tokens a page holds (S).
        dtype: Of the model's hidden states.
        device: Where the model computes.
    """

    def __init__(
        self,
        geometry: Sequence[LayerGeometry],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.geometry = tuple(geometry)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Zeroed, not empty: a masked key's weight is 0, and 0 * NaN of stale memory is NaN.
        self.keys = [
            torch.zeros(
                num_blocks, block_size, g.num_kv_heads, g.key_dim, dtype=dtype, device=device
            )
            for g in geometry
        ]
        self.values = [
            torch.zeros(
                num_blocks, block_size, g.num_kv_heads, g.value_dim, dtype=dtype, device=device
            )
            for g in geometry
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def has_form(
        self, geometry: Sequence[LayerGeometry], block_size: int, dtype: torch.dtype
    ) -> bool:
        """Whether its pages are of that form, however many there are."""
        return (
            self.geometry == tuple(geometry)
            and self.block_size == block_size
            and self.keys[0].dtype == dtype
        )

    def grow(self, num_blocks: int) -> None:
        """Add pages behind the others; what they hold stays, their addresses change.

        Layer by layer, so that at most one layer is there twice.
        """
        for tensors in (self.keys, self.values):
            for index, pages in enumerate(tensors):
                grown = pages.new_zeros(num_blocks, *pages.shape[1:])
                grown[: self.num_blocks] = pages
                tensors[index] = grown
        self.num_blocks = num_blocks

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole pages in every layer (copy-on-write before a step's writes)."""
        if not copies:
            return
        device = self.keys[0].device
        sources = torch.tensor([copy.source for copy in copies], device=device)
        targets = torch.tensor([copy.target for copy in copies], device=device)
        for pages in (*self.keys, *self.values):
            pages[targets] = pages[sources]


def bytes_per_block(geometry: Sequence[LayerGeometry], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page across all layers: sum over layers of K * (E + E') * S * itemsize."""
    return sum(g.numel for g in geometry) * block_size * dtype.itemsize
