"""Attributes set for the length of a rollout and put back exactly."""

from __future__ import annotations

from typing import Any

from tritonhybrid.interrupts import InterruptsHeld

_ABSENT = object()


class Patches:
    """A stack of instance attributes; :meth:`undo` leaves no trace of them.

    Works on ``__dict__`` directly, so that a class attribute shadowed for a while
    is uncovered again and ``nn.Module.__setattr__`` is not involved.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[dict[str, Any], str, Any]] = []

    def set(self, target: object, name: str, value: object) -> None:
        """Set an instance attribute and remember what was there."""
        attributes = target.__dict__
        self._undo.append((attributes, name, attributes.get(name, _ABSENT)))
        attributes[name] = value

    def undo(self) -> None:
        """Put everything back, newest first."""
        with InterruptsHeld():
            while self._undo:
                attributes, name, value = self._undo.pop()
                if value is _ABSENT:
                    attributes.pop(name, None)
                else:
                    attributes[name] = value
