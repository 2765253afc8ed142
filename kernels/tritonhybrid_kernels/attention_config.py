"""Tile sizes of attention launches: a prefill's by its query rows, a decode step's by its group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from tritonhybrid_kernels.launch import Mma, NarrowRead


class AttentionConfig(NamedTuple):
    """Tile sizes and compile options of an attention launch."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int

    def constants(
        self,
        group: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        softcap: float | None,
        window: int | None,
    ) -> dict[str, Any]:
        """Return the constexpr arguments that attention kernels share."""
        return {
            "GROUP": group,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "BLOCK_M": self.block_m,
            "TILE": self.tile,
            "BLOCK_E": triton.next_power_of_2(head_dim),
            "HAS_SOFTCAP": softcap is not None,
            "HAS_WINDOW": window is not None,
        }

    @property
    def options(self) -> dict[str, int]:
        """Return the compile options of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def expected_mma(self, dtype: torch.dtype, arch: int) -> Mma:
        """Return the matrix instruction the audit must find."""
        if dtype == torch.float32:
            return "none"
        return "HGMMA" if arch >= 90 and self.block_m >= 64 else "HMMA"

    def table_reads(self, block_size: int) -> dict[str, NarrowRead]:
        """Return how the audit finds the block table read: by key where a tile spans blocks."""
        if block_size % self.tile == 0:
            return {}
        return {"block_table_ptr": NarrowRead(32, "one entry a key, beside its K * E numbers")}


def attention_config(
    max_rows: int | None, group: int, head_dim: int, dtype: torch.dtype, arch: int
) -> AttentionConfig:
    """Choose the tiles of a prefill.

    Args:
        max_rows: most query rows (queries times `group`) of a sequence, None when unknown.
        group: query heads a KV head.
        head_dim: E.
        dtype: of q and the caches.
        arch: compute capability, e.g. 90.
    """
    wide = head_dim > 128
    if dtype == torch.float32:
        # Without tensor cores the accumulator must fit the registers beside both operands.
        chosen = AttentionConfig(16 if wide else 32, 16, 8, 2)
    elif max_rows is not None and max_rows <= 16:
        chosen = AttentionConfig(16, 32 if wide else 64, 4, 2)
    elif max_rows is not None and max_rows <= 64:
        chosen = AttentionConfig(64, 32 if wide else 64, 4 if arch >= 90 else 8, 2)
    elif arch >= 90:
        chosen = AttentionConfig(128, 32 if wide else 64, 8, 2)
    else:
        chosen = AttentionConfig(64 if wide else 128, 32 if wide else 64, 8, 2)
    # One query's heads are the least a program takes.
    return chosen._replace(block_m=max(chosen.block_m, triton.next_power_of_2(group)))


def decode_config(group: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """Choose the tiles of a decode step from the query heads a KV head, E and the dtype."""
    # The matrix instruction takes 16 rows at least.
    block_m = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:
        return AttentionConfig(block_m, 16 if head_dim > 128 else 32, 8, 2)
    # The table read before a tile takes half of the pipeline's stages: five keep two tiles of
    # keys and values in flight.
    return AttentionConfig(block_m, 32 if head_dim > 128 else 64, 4 if block_m <= 32 else 8, 5)
