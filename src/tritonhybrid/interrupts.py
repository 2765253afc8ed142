"""Ctrl-C held back while training state is put back, and delivered right after."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class InterruptsHeld:
    """Holds SIGINT for the length of a block, so that a half-done restoration can't happen.

    A context manager. Only the main thread runs signal handlers: in another thread,
    or where SIGINT has no Python handler, it does nothing.
    """

    def __enter__(self) -> InterruptsHeld:
        """Take the handler's place."""
        self._held: list[tuple[int, FrameType | None]] = []
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._hold)
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
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self._held:
            self._handler(*self._held[0])

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held.append((number, frame))
