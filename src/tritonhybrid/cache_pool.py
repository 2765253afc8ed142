"""The one key-value cache of an engine, kept from call to call within its budget."""

from __future__ import annotations

import os
from collections.abc import Sequence as Sized
from pathlib import Path

import torch

from tritonhybrid.block_manager import BlockManager
from tritonhybrid.config import HybridConfig
from tritonhybrid.errors import CacheExhaustedError, explain
from tritonhybrid.kv_cache import LayerGeometry, PagedKVCache, bytes_per_block
from tritonhybrid.long_rope import LongRope
from tritonhybrid.sequence import Sequence

DEFAULT_BLOCK_SIZE = 64


class CachePool:
    """Pages for call after call: made when needed, grown in place of being made anew.

    Args:
        config: kv_cache_bytes, kv_cache_share, block_size and max_num_seqs are read.
    """

    def __init__(self, config: HybridConfig) -> None:
        self._config = config
        self.cache: PagedKVCache | None = None
        self.blocks: BlockManager | None = None

    def release(self) -> None:
        """Give the memory back; no table may hold a page."""
        self.cache = None
        self.blocks = None

    def acquire(
        self,
        geometry: Sized[LayerGeometry],
        sequences: Sized[Sequence],
        dtype: torch.dtype,
        device: torch.device,
        rope: LongRope | None,
    ) -> tuple[PagedKVCache, BlockManager]:
        """Pages with which these sequences wait as little as the budget allows.

        Args:
            geometry: One entry a decoder layer.
            sequences: Of the call.
            dtype: Of the keys and values.
            device: Where the model computes.
            rope: The rule of a model with two rope tables.

        Raises:
            CacheExhaustedError: The budget is less than a page.
        """
        size = self._config.block_size
        block_size = DEFAULT_BLOCK_SIZE if size == "auto" else size
        per_block = bytes_per_block(geometry, block_size, dtype)
        most = self._budget(device) // per_block
        if most < 1:
            raise CacheExhaustedError(
                explain(
                    "The key-value cache needs at least one page",
                    expected=f"kv_cache_bytes >= {per_block}",
                    got=self._budget(device),
                    hint="Raise kv_cache_bytes or kv_cache_share, or lower block_size.",
                )
            )
        wanted = min(most, _blocks_wanted(sequences, block_size, self._config.max_num_seqs, rope))
        if self.cache is None or not self.cache.has_form(geometry, block_size, dtype):
            self.release()
            self.cache = PagedKVCache(geometry, wanted, block_size, dtype, device)
            self.blocks = BlockManager(wanted, block_size)
        assert self.blocks is not None
        if self.cache.num_blocks < wanted:
            if self.blocks.num_used or self.blocks.num_idle:
                self.cache.grow(wanted)
                self.blocks.grow(wanted)
            else:
                self.release()
                self.cache = PagedKVCache(geometry, wanted, block_size, dtype, device)
                self.blocks = BlockManager(wanted, block_size)
        self.blocks.make_room(wanted, {sequence.prompt: None for sequence in sequences})
        return self.cache, self.blocks

    def _budget(self, device: torch.device) -> int:
        """Bytes the cache may take, those it has included."""
        if self._config.kv_cache_bytes != "auto":
            return self._config.kv_cache_bytes
        own = self.cache.num_bytes if self.cache is not None else 0
        return int(self._config.kv_cache_share * (_free_bytes(device) + own))


def _blocks_wanted(
    sequences: Sized[Sequence], block_size: int, max_num_seqs: int, rope: LongRope | None
) -> int:
    """Pages with which no sequence in flight ever waits: prompts shared, tails own."""
    seen: set[int] = set()
    needs = []
    # The shared pages are counted with the longest, so that the most a choice of them needs are
    # the largest needs.
    for sequence in sorted(sequences, key=lambda s: s.max_length, reverse=True):
        total = -(-sequence.max_length // block_size)
        shared = len(sequence.prompt) // block_size
        if rope is not None and rope.starts_anew:
            # What a sequence recomputes is its own.
            shared = 0
        # One page more: the copy of a shared last page exists beside the original.
        needs.append(total - shared + 1 if sequence.prompt_key in seen else total + 1)
        seen.add(sequence.prompt_key)
    needs.sort(reverse=True)
    return sum(needs[:max_num_seqs])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # sysconf's free pages leave out the file cache, which gives way; the kernel's own estimate
    # counts it.
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
