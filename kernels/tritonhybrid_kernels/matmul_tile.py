"""The tile that every projection is made of: acc[BLOCK_M, BLOCK_N] of x W^T, and its configuration.

x [T, K] and W [N, K] (nn.Linear's layout) are both contiguous along K, so the two loads of a step
are 128 bits wide without a transposed copy. Out-of-range rows and columns read row 0 and their
results are never stored; only a K that is no multiple of BLOCK_K is masked. Tiles are walked in
groups of GROUP_M rows, so that a group's x and one column's W stay in L2 together (the order of
Triton's matrix multiplication tutorial).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from tritonhybrid_kernels.launch import Mma, NarrowRead


@triton.jit
def tile_coordinates(pid, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Map a program id to (tile_m, tile_n) in grouped order."""
    group_size = GROUP_M * num_tiles_n
    first_m = (pid // group_size) * GROUP_M
    rows_in_group = tl.minimum(num_tiles_m - first_m, GROUP_M)
    within = pid % group_size
    return first_m + within % rows_in_group, within // rows_in_group


@triton.jit
def tile_rows(tile, size, BLOCK: tl.constexpr):
    """Return the indices [BLOCK] of a tile, and the same with out-of-range ones at 0, in int64."""
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    return offs, tl.where(offs < size, offs, 0).to(tl.int64)


@triton.jit
def matmul_tile(
    x_ptrs,  # [BLOCK_M, BLOCK_K] pointers to the first step of x
    w_ptrs,  # [BLOCK_K, BLOCK_N] pointers to the first step of W^T
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICT_W: tl.constexpr,
):
    """Return the fp32 accumulator [BLOCK_M, BLOCK_N] over all of K, in ascending order of K."""
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, eviction_policy=EVICT_W)
        else:
            mask_k = offs_k < depth - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0, eviction_policy=EVICT_W)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


# Rows of tiles that share a column's weights in L2.
_GROUP_M: Final = 8


class MatmulConfig(NamedTuple):
    """Tile sizes and compile options of one projection launch."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    @classmethod
    def from_tile(cls, tile: tuple[int, int, int, int, int]) -> MatmulConfig:
        """Complete (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)."""
        block_m, block_n, block_k, num_warps, num_stages = tile
        return cls(block_m, block_n, block_k, _GROUP_M, num_warps, num_stages)

    def constants(self, depth: int, num_rows: int) -> dict[str, Any]:
        """Return the constexpr arguments of a projection kernel."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "EVEN_K": depth % self.block_k == 0,
            # With one tile of rows each weight is read once: it need not push x out of L2.
            "EVICT_W": "evict_first" if num_rows <= self.block_m else "",
        }

    def expected_mma(self, dtype: torch.dtype, arch: int) -> Mma:
        """Return the matrix instruction the audit must find in a projection with this tile."""
        if dtype == torch.float32:
            return "none"
        # The warp-group instruction multiplies 64 rows at least.
        return "HGMMA" if arch >= 90 and self.block_m >= 64 else "HMMA"

    @property
    def options(self) -> dict[str, int]:
        """Return the compile options of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Multiprocessors of the GPUs the heuristics aim at: A100 for sm_80, H100 and H200 for sm_90.
_NUM_SMS: Final = {80: 108, 90: 132}


def _num_sms(arch: int) -> int:
    return _NUM_SMS[90] if arch >= 90 else _NUM_SMS[80]


# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) of a tile. A table lists the tiles up to a
# number of rows, widest first. The tiles with BLOCK_M of at least 64 use the warp-group instruction
# on sm_90. None spills more than the audit allows on the architectures it is for (tests/audit).
_Tile = tuple[int, int, int, int, int]
_Table = tuple[tuple[int, tuple[_Tile, ...]], ...]
_ANY_ROWS: Final = 1 << 62

_HALF_TILES: Final[_Table] = (
    (16, ((16, 64, 128, 4, 5), (16, 32, 128, 4, 5), (16, 16, 128, 2, 5))),
    (32, ((32, 64, 128, 4, 4), (32, 32, 128, 4, 4))),
    (64, ((64, 64, 64, 4, 5), (64, 32, 64, 4, 5))),
    (128, ((128, 64, 64, 4, 4), (128, 32, 64, 4, 4))),
    (_ANY_ROWS, ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4))),
)
_HALF_PAIR_TILES_SM80: Final[_Table] = (
    (16, ((16, 32, 128, 4, 4), (16, 16, 128, 2, 4))),
    (32, ((32, 32, 64, 4, 4),)),
    (64, ((64, 32, 32, 4, 4),)),
    (_ANY_ROWS, ((128, 64, 64, 8, 4), (128, 32, 64, 4, 4))),
)
_HALF_PAIR_TILES_SM90: Final[_Table] = (
    (16, ((16, 32, 128, 4, 4), (16, 16, 128, 2, 4))),
    (32, ((32, 32, 128, 4, 3),)),
    (64, ((64, 32, 64, 4, 4),)),
    (128, ((128, 64, 64, 8, 3), (128, 32, 64, 4, 4))),
    (_ANY_ROWS, ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3))),
)
_FP32_TILES: Final[_Table] = (
    (16, ((16, 32, 64, 4, 3), (16, 16, 64, 4, 3))),
    (64, ((64, 32, 32, 4, 3), (32, 32, 32, 4, 3))),
    (_ANY_ROWS, ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3))),
)
_FP32_PAIR_TILES: Final[_Table] = (
    (16, ((16, 32, 64, 4, 3), (16, 16, 64, 4, 3))),
    (_ANY_ROWS, ((64, 32, 32, 4, 3), (32, 32, 32, 4, 3))),
)


def _tile_table(dtype: torch.dtype, arch: int, num_weights: int) -> _Table:
    if dtype == torch.float32:
        return _FP32_TILES if num_weights == 1 else _FP32_PAIR_TILES
    if num_weights == 1:
        return _HALF_TILES
    return _HALF_PAIR_TILES_SM90 if arch >= 90 else _HALF_PAIR_TILES_SM80


def matmul_tiles(dtype: torch.dtype, arch: int, num_weights: int = 1) -> list[MatmulConfig]:
    """Return every configuration the heuristic may choose: what the tests and the audit cover."""
    table = _tile_table(dtype, arch, num_weights)
    tiles = sorted({tile for _, tiles in table for tile in tiles})
    return [MatmulConfig.from_tile(tile) for tile in tiles]


@lru_cache(maxsize=4096)
def matmul_config(
    num_rows: int, num_columns: int, depth: int, dtype: torch.dtype, arch: int, num_weights: int = 1
) -> MatmulConfig:
    """Choose the tile of a projection from its shape alone: integer arithmetic, nothing measured.

    Among the tiles for this number of rows, the widest that still gives nearly every
    multiprocessor one: a weight-bound projection needs all of them reading.

    Args:
        num_rows: T, at least 1.
        num_columns: N, summed over the weights that share the launch as separate columns.
        depth: K.
        dtype: of x and W.
        arch: compute capability, e.g. 90.
        num_weights: accumulators a program holds: 1, or 2 for gate and up.
    """
    table = _tile_table(dtype, arch, num_weights)
    tiles = next(tiles for most_rows, tiles in table if num_rows <= most_rows)
    enough = _num_sms(arch) * 9 // 10
    chosen = next(
        (
            tile
            for tile in tiles
            if triton.cdiv(num_rows, tile[0]) * triton.cdiv(num_columns, tile[1]) >= enough
        ),
        tiles[-1],
    )
    # A toy model's K needs no wider step than itself; 16 is the least a matrix instruction takes.
    narrowest = max(16, triton.next_power_of_2(depth))
    config = MatmulConfig.from_tile(chosen)
    return config._replace(block_k=min(config.block_k, narrowest))


# Rows and dtypes at which the audit compiles a projection of a large model: a decode step at each
# tile height, and prefills. A small model's decode steps take the narrow tiles.
AUDIT_ROWS: Final = (
    *((num_rows, torch.bfloat16) for num_rows in (1, 32, 64, 128, 512, 4096)),
    *((num_rows, torch.float16) for num_rows in (16, 4096)),
    *((num_rows, torch.float32) for num_rows in (1, 4096)),
)
AUDIT_ROWS_SMALL: Final = tuple((num_rows, torch.bfloat16) for num_rows in (1, 64, 128, 512))
AUDIT_ROWS_VARIANT: Final = tuple((num_rows, torch.bfloat16) for num_rows in (1, 4096))

# The bias of a projection, in the order of its accumulator's columns.
BIAS_READ: Final = NarrowRead(16, "one number a column, beside a whole row of the weight")
