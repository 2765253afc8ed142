"""Pages of the key-value cache: who owns which, counted by reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCopy:
    """A page whose content must be copied before the next write (copy-on-write)."""

    source: int
    target: int


class BlockManager:
    """Hands out pages of ``block_size`` tokens.

    A page may stand in several tables; it is free again when the last of them
    lets go. A table is owned by its sequence; the manager only counts.

    Args:
        num_blocks: Pages in the cache.
        block_size: Tokens a page holds.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Ascending ids come off first, so a fresh table is one run of pages.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that at least one table owns."""
        return self.num_blocks - len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that all pages hold together."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether so many pages are free."""
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take pages, each with one reference; the caller has asked first."""
        assert self.can_allocate(num_blocks)
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, table: Sequence[int]) -> list[int]:
        """A second table over the same pages, each with one more reference."""
        for block in table:
            self._references[block] += 1
        return list(table)

    def append_cost(self, table: Sequence[int], position: int) -> int:
        """Pages that writing ``position`` would take: 1 past the end or if shared, else 0."""
        index = position // self.block_size
        if index >= len(table):
            return 1
        return int(self._references[table[index]] > 1)

    def append(self, table: list[int], position: int) -> BlockCopy | None:
        """Make ``position`` writable by this table alone; the caller has asked the cost.

        Args:
            table: Changed in place: one page longer, or its page replaced.
            position: Next token index to be written.

        Returns:
            The copy to carry out before the write if the page was shared.
        """
        index = position // self.block_size
        if index >= len(table):
            table.extend(self.allocate(1))
            return None
        shared = table[index]
        if self._references[shared] == 1:
            return None
        table[index] = self.allocate(1)[0]
        self._references[shared] -= 1
        return BlockCopy(shared, table[index])

    def free(self, table: list[int]) -> None:
        """Let go of a table's pages; the table is emptied in place."""
        for block in reversed(table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        table.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Hold the counts against the tables in use.

        Args:
            tables: Every table that owns pages.

        Raises:
            AssertionError: A count differs from the tables, or pages were lost.
        """
        held = Counter(block for table in tables for block in table)
        counted = {block: n for block, n in enumerate(self._references) if n}
        if dict(held) != counted:
            raise AssertionError(f"page references {counted} differ from the tables' {dict(held)}")
        if len(set(self._free)) != len(self._free) or set(self._free) & set(counted):
            raise AssertionError("a page is free twice, or free and in use")
        if len(self._free) + len(counted) != self.num_blocks:
            raise AssertionError(
                f"free {len(self._free)} + used {len(counted)} pages are not {self.num_blocks}"
            )
