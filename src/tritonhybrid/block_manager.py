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
        # One byte a page, 1 where it is free: a run of free pages is a substring.
        self._is_free = bytearray(b"\x01" * num_blocks)
        self._num_free = num_blocks
        self._references = [0] * num_blocks
        # Where the next table's run is looked for first: past the room of the last one.
        self._next_run = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Pages that at least one table owns."""
        return self.num_blocks - self._num_free

    @property
    def capacity(self) -> int:
        """Tokens that all pages hold together."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether so many pages are free."""
        return num_blocks <= self._num_free

    def allocate(self, num_blocks: int, *, room: int = 0) -> list[int]:
        """Take pages, each with one reference; the caller has asked first.

        Neighbouring pages if there are such: attention on the CPU reads a run in place.

        Args:
            num_blocks: Pages to take.
            room: Pages that the table may grow to; what lies behind the taken ones is
                left to it as long as other pages are free.
        """
        assert self.can_allocate(num_blocks)
        room = max(room, num_blocks)
        if self._num_free == self.num_blocks:
            self._next_run = 0
        start = self._find_run(room, self._next_run)
        if start >= 0:
            self._next_run = start + room
        elif room > num_blocks:
            start = self._find_run(num_blocks, 0)
        taken = list(range(start, start + num_blocks)) if start >= 0 else []
        while len(taken) < num_blocks:
            taken.append(self._is_free.index(1, taken[-1] + 1 if taken else 0))
        for block in taken:
            self._take(block)
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

    def append(self, table: list[int], position: int, *, room: int = 0) -> BlockCopy | None:
        """Make ``position`` writable by this table alone; the caller has asked the cost.

        Args:
            table: Changed in place: one page longer, or its page replaced.
            position: Next token index to be written.
            room: Pages that the table may grow to.

        Returns:
            The copy to carry out before the write if the page was shared.
        """
        index = position // self.block_size
        if index >= len(table):
            behind = table[-1] + 1 if table else self.num_blocks
            if behind < self.num_blocks and self._is_free[behind]:
                self._take(behind)
                table.append(behind)
            else:
                table += self.allocate(1, room=room - index)
            return None
        shared = table[index]
        if self._references[shared] == 1:
            return None
        table[index] = self.allocate(1, room=room - index)[0]
        self._references[shared] -= 1
        return BlockCopy(shared, table[index])

    def free(self, table: list[int]) -> None:
        """Let go of a table's pages; the table is emptied in place."""
        for block in reversed(table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._is_free[block] = 1
                self._num_free += 1
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
        free = {block for block, is_free in enumerate(self._is_free) if is_free}
        if free & set(counted):
            raise AssertionError("a page is free and in use")
        if len(free) + len(counted) != self.num_blocks or len(free) != self._num_free:
            raise AssertionError(
                f"free {len(free)} (counted {self._num_free}) + used {len(counted)} pages "
                f"are not {self.num_blocks}"
            )

    def _find_run(self, length: int, start: int) -> int:
        """First page of so many free neighbours from ``start`` on, else from 0; -1 if none."""
        run = b"\x01" * length
        found = self._is_free.find(run, start)
        return found if found >= 0 else self._is_free.find(run)

    def _take(self, block: int) -> None:
        self._is_free[block] = 0
        self._num_free -= 1
        self._references[block] = 1
