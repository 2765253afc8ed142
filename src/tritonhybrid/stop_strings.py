"""Notices stop strings while tokens come in, at a cost that does not grow with the text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

# Tokens decoded anew each step: at least these, at most a few times as many.
_WINDOW = 8
# So many tokens without a place to cut are no character that is still to be completed.
_MAX_WINDOW = 32
_INCOMPLETE = "\ufffd"


class StopStrings:
    """Follows one output and says where its text first holds a stop string.

    Each call decodes the last few tokens only. A window of tokens is settled once its
    text ends with a whole character and later tokens no longer change it; of the text
    before the window only as much is kept as a stop string can reach back. What the
    window finds is looked up in the whole text, once, so a hit is exact.

    Args:
        tokenizer: Has ``decode(ids, skip_special_tokens=...)``.
        stop: Strings that are not empty.
        skip_special_tokens: Whether special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skips = skip_special_tokens
        self._reach = max(map(len, self._stop)) - 1
        self._num_seen = 0
        # The newest tokens; the first of them are settled and spell _context, the end of _tail.
        self._ids: list[int] = []
        self._num_context = 0
        self._context = ""
        self._tail = ""

    def cut(self, output: Sequence[int]) -> str | None:
        """The text before the first stop string, or None if there is none yet.

        Args:
            output: All tokens so far; one more than in the last call, or several.
        """
        self._ids += output[self._num_seen :]
        self._num_seen = len(output)
        text = self._decode(self._ids)
        recent = self._after_tail(text)
        if any(stop in recent for stop in self._stop):
            whole = self._decode(output)
            found = [at for stop in self._stop if (at := whole.find(stop)) >= 0]
            if found:
                return whole[: min(found)]
        if len(self._ids) - self._num_context >= _WINDOW:
            self._settle(text)
        return None

    def _settle(self, text: str) -> None:
        """Move the window on, as far as its text can't change any more."""
        count = len(self._ids)
        is_overdue = count - self._num_context >= _MAX_WINDOW
        # The newest token stays in the window: the next one may belong to it.
        for end in range(count - 1, max(count - 5, self._num_context), -1):
            settled = self._decode(self._ids[:end])
            if settled == self._context:
                # Special tokens that are left out.
                del self._ids[self._num_context : end]
                return
            is_whole = text.startswith(settled) and not settled.endswith(_INCOMPLETE)
            if not (is_whole or is_overdue):
                continue
            # With text before it, so that the window never begins a text and loses its space.
            for start in (max(end - 4, 0), max(end - 8, 0), 0):
                context = self._decode(self._ids[start:end])
                if context:
                    break
            self._tail = self._after_tail(settled)[-(self._reach + len(context)) :]
            del self._ids[:start]
            self._num_context, self._context = end - start, context
            return

    def _after_tail(self, text: str) -> str:
        """What is kept of the settled text, and after it the text of the newest tokens."""
        kept = len(self._context)
        if not text.startswith(self._context):
            # A token has changed what seemed settled (half a character, a space).
            pairs = zip(text, self._context, strict=False)
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        lost = len(self._context) - kept
        return self._tail[: max(len(self._tail) - lost, 0)] + text[kept:]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=self._skips)
        return text
