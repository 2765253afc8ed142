"""Full pages by the tokens that lead up to their end, so that equal beginnings share them."""

from __future__ import annotations

from typing import Final

# The node before a sequence's first page.
ROOT: Final = 0

_Key = tuple[int, tuple[int, ...]]


class PrefixIndex:
    """A trie of pages: each stands for its own tokens after those of its parent.

    Tokens are compared, not hashes of them, so two beginnings never collide. A node's
    number is never given out again: what hung on a page that was discarded can't be found
    any more, and gives way like everything else that nobody uses.
    """

    def __init__(self) -> None:
        self._children: dict[_Key, tuple[int, int]] = {}
        self._keys: dict[int, _Key] = {}
        self._next_node = ROOT + 1

    def __len__(self) -> int:
        """Pages in the index."""
        return len(self._keys)

    def __contains__(self, page: int) -> bool:
        """Whether a page can be found by its tokens."""
        return page in self._keys

    def find(self, parent: int, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """Node and page of these tokens behind ``parent``, or None."""
        return self._children.get((parent, tokens))

    def add(self, parent: int, tokens: tuple[int, ...], page: int) -> int:
        """Enter a full page.

        Args:
            parent: Node of the page before it, or ROOT.
            tokens: What it holds.
            page: Its number.

        Returns:
            The node of these tokens; it is another page's if they were known before.
        """
        key = (parent, tokens)
        known = self._children.get(key)
        if known is not None:
            return known[0]
        node = self._next_node
        self._next_node += 1
        self._children[key] = (node, page)
        self._keys[page] = key
        return node

    def discard(self, page: int) -> None:
        """Forget a page if it is known; its tokens are about to be overwritten."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._children[key]

    def clear(self) -> None:
        """Forget every page (the weights have changed)."""
        self._children.clear()
        self._keys.clear()
