"""Starts the demo's ranks, waits for them, and leaves none behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

    from tritonhybrid.demo.settings import DemoSettings

INTERRUPTED = 130
GRACE_S = 10.0
PRELOAD = ["torch", "deepspeed", "transformers", "tritonhybrid.demo.run"]


def launch(settings: DemoSettings, began_at: float) -> int:
    """Run the demo on one rank in this process, or on more in processes of their own.

    Args:
        settings: Options; ``ranks`` says how many processes.
        began_at: ``time.time()`` of the command's first line.

    Returns:
        Exit code of rank 0, of the first rank that failed, or 130 after Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="tritonhybrid-") as scratch:
        rendezvous = Path(scratch) / "rendezvous"
        if settings.ranks == 1:
            from tritonhybrid.demo.run import run_rank

            return run_rank(0, settings, rendezvous, began_at)
        return _launch_processes(settings, rendezvous, began_at)


def _launch_processes(settings: DemoSettings, rendezvous: Path, began_at: float) -> int:
    # A forkserver imports the libraries once for all ranks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks: list[BaseProcess] = [
        context.Process(
            target=_rank_main, args=(rank, settings, rendezvous, began_at), name=f"rank {rank}"
        )
        for rank in range(settings.ranks)
    ]
    try:
        for process in ranks:
            process.start()
        return _wait_for(ranks)
    except KeyboardInterrupt:
        # The terminal signals every process of the group, `kill -INT` only this one.
        for process in ranks:
            _interrupt(process)
        _join(ranks, GRACE_S)
        return INTERRUPTED
    finally:
        for end in (BaseProcess.terminate, BaseProcess.kill):
            for process in ranks:
                if process.is_alive():
                    end(process)
            _join(ranks, GRACE_S)


def _wait_for(ranks: list[BaseProcess]) -> int:
    waiting = {process.sentinel: process for process in ranks}
    while waiting:
        for sentinel in wait(list(waiting)):
            process = waiting.pop(int(sentinel))  # type: ignore[arg-type]
            process.join()
            if process.exitcode:
                # A rank that lost its peer ends by itself; one that hangs is ended.
                _join(list(waiting.values()), GRACE_S)
                return process.exitcode if process.exitcode > 0 else 128 - process.exitcode
    return 0


def _join(ranks: list[BaseProcess], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in ranks:
        if process.pid is not None:
            process.join(max(0.0, deadline - time.monotonic()))


def _interrupt(process: BaseProcess) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGINT)


def _rank_main(rank: int, settings: DemoSettings, rendezvous: Path, began_at: float) -> None:
    interrupted = threading.Event()

    def interrupt_once(_signum: int, _frame: FrameType | None) -> None:
        # The terminal and the parent may both send it; the second must not cut the clean-up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt_once)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from tritonhybrid.demo.run import run_rank

    try:
        code = run_rank(rank, settings, rendezvous, began_at)
    except BaseException:
        # A collective that loses its peer to Ctrl-C reports a lost connection.
        if not interrupted.is_set():
            raise
        code = INTERRUPTED
    sys.exit(code)


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    wait([parent.sentinel])
    os._exit(128 + signal.SIGTERM)
