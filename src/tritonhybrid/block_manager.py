"""Pages of the key-value cache: who owns which, counted by reference."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tritonhybrid.prefix_index import ROOT, PrefixIndex


@dataclass(frozen=True)
class BlockCopy:
    """A page whose content must be copied before the next write (copy-on-write)."""

    source: int
    target: int


@dataclass
class PageTrail:
    """How far a table's pages have been entered into the index.

    Args:
        num_pages: Pages from the table's beginning.
        node: The index's node of the last of them.
    """

    num_pages: int = 0
    node: int = ROOT


@dataclass(frozen=True)
class Match:
    """Pages that hold the beginning of a sequence already.

    Args:
        pages: In order; full ones.
        node: The index's node of the last of them.
        num_idle: How many of them nobody owns, so that taking them uses free pages up.
    """

    pages: tuple[int, ...] = ()
    node: int = ROOT
    num_idle: int = 0


class BlockManager:
    """Hands out pages of ``block_size`` tokens.

    A page may stand in several tables; it is free again when the last of them
    lets go. A table is owned by its sequence; the manager only counts. Full pages that
    were :meth:`publish`-ed can be found by their tokens (:meth:`match`), also when nobody
    owns them any more: such idle pages count as free and are overwritten when no others
    are left, the longest unused first.

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
        self._num_shared = 0
        # Where the next table's run is looked for first: past the room of the last one.
        self._next_run = 0
        self._index = PrefixIndex()
        # Pages in the index that nobody owns, the longest unused first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.num_evicted = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody owns, idle ones included."""
        return self._num_free + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages that nobody owns and whose tokens are still known."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that at least one table owns."""
        return self.num_blocks - self.num_free

    @property
    def num_shared(self) -> int:
        """Pages that stand in more than one table."""
        return self._num_shared

    @property
    def capacity(self) -> int:
        """Tokens that all pages hold together."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether so many pages are free."""
        return num_blocks <= self.num_free

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
        # For the whole room: what is evicted together once belonged together, one run again.
        while self._idle and self._num_free < room:
            self._evict()
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
            self._add_reference(block)
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
        self._drop_reference(shared)
        return BlockCopy(shared, table[index])

    def free(self, table: list[int]) -> None:
        """Let go of a table's pages; the table is emptied in place."""
        # The end first: what leads up to a page is of use longer than the page itself.
        for block in reversed(table):
            self._drop_reference(block)
            if self._references[block] == 0:
                if block in self._index:
                    self._idle[block] = None
                else:
                    self._is_free[block] = 1
                    self._num_free += 1
        table.clear()

    def match(self, tokens: Sequence[int]) -> Match:
        """Find the pages that hold the beginning of ``tokens``, the last token left out.

        Args:
            tokens: Of a sequence; its last token has to be computed in any case.
        """
        pages: list[int] = []
        node = ROOT
        if len(self._index):
            for start in range(0, len(tokens) - self.block_size, self.block_size):
                found = self._index.find(node, tuple(tokens[start : start + self.block_size]))
                if found is None:
                    break
                node = found[0]
                pages.append(found[1])
        return Match(tuple(pages), node, sum(page in self._idle for page in pages))

    def reuse(self, match: Match) -> list[int]:
        """A new table over the matched pages, each with one more reference."""
        for page in match.pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._add_reference(page)
        return list(match.pages)

    def publish(self, table: Sequence[int], tokens: Sequence[int], trail: PageTrail) -> None:
        """Let a table's full pages be found by their tokens.

        Args:
            table: Its pages; no full one of them is ever written again.
            tokens: All tokens whose keys and values are in the pages, or will be before
                another sequence's step reads them.
            trail: How far this table has been published; moved on in place.
        """
        size = self.block_size
        for index in range(trail.num_pages, len(tokens) // size):
            own = tuple(tokens[index * size : (index + 1) * size])
            trail.node = self._index.add(trail.node, own, table[index])
            trail.num_pages = index + 1

    def make_room(self, num_blocks: int, prompts: Iterable[Sequence[int]]) -> None:
        """Give idle pages up in time, so that what a call takes lies in runs of neighbours.

        Args:
            num_blocks: Pages the call may use.
            prompts: Its prompts; pages that hold their beginnings stay as long as others don't.
        """
        if not self._idle:
            return
        kept: set[int] = set()
        for tokens in prompts:
            for page in reversed(self.match(tokens).pages):
                if page in self._idle:
                    kept.add(page)
                    self._idle.move_to_end(page)
        while len(self._idle) > len(kept) and self._num_free < num_blocks - len(kept):
            self._evict()

    def forget(self) -> None:
        """Nothing in the pages is of use to later sequences (the weights have changed)."""
        self._index.clear()
        for page in self._idle:
            self._is_free[page] = 1
        self._num_free += len(self._idle)
        self._idle.clear()

    def grow(self, num_blocks: int) -> None:
        """Take note of pages that were added behind the others."""
        added = num_blocks - self.num_blocks
        self._is_free += b"\x01" * added
        self._references += [0] * added
        self._num_free += added
        self.num_blocks = num_blocks

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
        shared = sum(n > 1 for n in counted.values())
        if shared != self._num_shared:
            raise AssertionError(f"{shared} pages are shared, {self._num_shared} were counted")
        free = {block for block, is_free in enumerate(self._is_free) if is_free}
        if (free | set(self._idle)) & set(counted):
            raise AssertionError("a page is free and in use")
        if free & set(self._idle) or any(page not in self._index for page in self._idle):
            raise AssertionError("a page is idle without being known, or free as well")
        num_pages = len(free) + len(self._idle) + len(counted)
        if num_pages != self.num_blocks or len(free) != self._num_free:
            raise AssertionError(
                f"free {len(free)} (counted {self._num_free}) + idle {len(self._idle)} "
                f"+ used {len(counted)} pages are not {self.num_blocks}"
            )

    def _find_run(self, length: int, start: int) -> int:
        """First page of so many free neighbours from ``start`` on, else from 0; -1 if none."""
        run = b"\x01" * length
        found = self._is_free.find(run, start)
        return found if found >= 0 else self._is_free.find(run)

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
        self._index.discard(page)
        self._is_free[page] = 1
        self._num_free += 1
        self.num_evicted += 1

    def _add_reference(self, block: int) -> None:
        self._references[block] += 1
        self._num_shared += self._references[block] == 2

    def _drop_reference(self, block: int) -> None:
        self._references[block] -= 1
        self._num_shared -= self._references[block] == 1

    def _take(self, block: int) -> None:
        self._is_free[block] = 0
        self._num_free -= 1
        self._references[block] = 1
