"""Ctrl-C held back where it would leave work half done, and delivered where it does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class InterruptsHeld:
    """Holds SIGINT for the length of a block, so that it can't come at a bad moment.

    Python runs signal handlers between any two bytecodes, also between the end of a
    ``with`` block and the first line of its ``__exit__``, which then never runs. Inside
    this block a Ctrl-C waits: for :meth:`deliver`, for :meth:`let_through`, or for the end.

    A context manager. Only the main thread runs signal handlers: in another thread,
    or where SIGINT has no Python handler, it does nothing.
    """

    def __init__(self) -> None:
        self._held: list[tuple[int, FrameType | None]] = []
        self._handler: Any = None
        self._is_open = False

    def __enter__(self) -> InterruptsHeld:
        """Take the handler's place."""
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the handler its place back, and the signal that came meanwhile.

        Raises:
            KeyboardInterrupt: From Python's own handler, if Ctrl-C was pressed.
        """
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.deliver()

    def deliver(self) -> None:
        """Hand over what was held so far.

        Raises:
            KeyboardInterrupt: From Python's own handler, if Ctrl-C was pressed.
        """
        while self._held:
            self._handler(*self._held.pop(0))

    def let_through(self, act: Callable[[], _Result]) -> _Result:
        """Run ``act`` with Ctrl-C delivered at once; held again from the first one on.

        Args:
            act: Leaves nothing half done wherever it is interrupted.

        Returns:
            What ``act`` returns.
        """
        # No call stands between these lines and their neighbours, so no signal does either.
        try:
            self._is_open = True
            self.deliver()
            return act()
        finally:
            self._is_open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let Ctrl-C through while somebody else's code runs, and hold it again afterwards."""
        try:
            self._is_open = True
            self.deliver()
            yield
        finally:
            self._is_open = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._is_open:
            self._held.append((number, frame))
            return
        self._is_open = False
        self._handler(number, frame)
        # A handler that does not raise leaves the block running.
        self._is_open = True
