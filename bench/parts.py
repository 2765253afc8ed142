"""Child processes with a time limit: a part that hangs or crashes takes nothing else along."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: exit status; negative for a signal; None where the limit ended it.
        tail: the end of what it printed.
    """

    code: int | None
    tail: str
    seconds: float

    @property
    def timed_out(self) -> bool:
        return self.code is None


def run_child(
    command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None
) -> Ended:
    """Run `command` to its end, or kill it with all its children after `limit_s` seconds."""
    start = time.monotonic()
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    code: int | None
    try:
        output, _ = child.communicate(timeout=max(limit_s, 0.1))
        code = child.returncode
    except subprocess.TimeoutExpired:
        # Its own session, so this reaches compilers and workers it started, and no one else.
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        code = None
    return Ended(code, output[-2000:], time.monotonic() - start)
