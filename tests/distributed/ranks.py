"""Gloo ranks that stay: processes that run the functions of a test module and never hang a run.

A forkserver that has imported torch, deepspeed and transformers forks each rank in milliseconds;
the ranks of a pool form one process group and serve call after call. A call that runs past its
time-out is killed, and the error holds every rank's stack.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

_START_TIMEOUT_S = 120.0
# How long the other ranks may go on after one has raised: enough to return, not to hang.
_GRACE_S = 20.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "transformers.models.llama.modeling_llama",
        # The first ZeRO-1 to 3 engine imports this, and all of torch's compiler with it: 3 s.
        "deepspeed.runtime.zero.muon.original_muon",
        "tritonhybrid.engine",
    ]
)


class RankError(AssertionError):
    """A rank raised, hung or died; the message holds what is known of each.

    Args:
        failures: What is known of each rank that failed.
        results: What the other ranks returned.
    """

    def __init__(self, failures: dict[int, str], results: dict[int, Any]) -> None:
        super().__init__("\n".join(f"rank {r}: {failures[r]}" for r in sorted(failures)))
        self.results = results


class RankPool:
    """Processes of one gloo group, started at the first call and after a failed one.

    Args:
        world_size: Ranks.
        filters: Warning filters in pytest's notation, in force on every rank.
    """

    def __init__(self, world_size: int, filters: Sequence[str] = ()) -> None:
        self.world_size = world_size
        self._filters = tuple(filters)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Call ``function(*args)`` on every rank at once.

        Args:
            function: Of a module's top level; the ranks load the module by its file.
            args: Can be pickled.
            timeout_s: Seconds until the ranks are killed.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: A rank raised, hung or died. The pool starts afresh next time.
        """
        __tracebackhide__ = True
        if not self._processes:
            self._start()
        job = (function.__code__.co_filename, function.__name__, args)
        for pipe in self._pipes:
            pipe.send(job)
        return self._collect(timeout_s)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(10)
        self.kill()

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="ranks")
        directory = Path(self._directory.name)
        for rank in range(self.world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve,
                args=(theirs, rank, self.world_size, directory, self._filters),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(_START_TIMEOUT_S)

    def _collect(self, timeout_s: float) -> list[Any]:
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.update(self._stacks(waiting))
                break
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    is_ok, value = waiting.pop(rank).recv()
                except EOFError:
                    is_ok, value = False, "the process died"
                (results if is_ok else failures)[rank] = value
                if not is_ok:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            self.kill()
            raise RankError(failures, results)
        return [results[rank] for rank in range(self.world_size)]

    def _stacks(self, waiting: dict[int, Connection]) -> dict[int, str]:
        """Have each rank that still runs write its stack."""
        assert self._directory is not None
        for rank in waiting:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return {
            rank: "still running\n" + _stack_file(Path(self._directory.name), rank).read_text()
            for rank in waiting
        }

    def kill(self) -> None:
        """End the processes at once."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None


def _stack_file(directory: Path, rank: int) -> Path:
    return directory / f"stack.{rank}"


def _serve(
    pipe: Connection, rank: int, world_size: int, directory: Path, filters: Sequence[str]
) -> None:
    """Join the group, then run jobs until told to stop."""
    with _stack_file(directory, rank).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        modules: dict[str, ModuleType] = {}
        job = None
        while True:
            try:
                if job is None:
                    value = _join(rank, world_size, directory, filters)
                else:
                    path, name, args = job
                    if path not in modules:
                        modules[path] = _load(path)
                    value = getattr(modules[path], name)(*args)
                answer = (True, value)
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send(answer)
            try:
                job = pipe.recv()
            except EOFError:
                return
            if job is None:
                _leave()
                return


def _join(rank: int, world_size: int, directory: Path, filters: Sequence[str]) -> None:
    import deepspeed
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    for text in filters:
        warnings.filterwarnings(*_filter(text))
    # Else DeepSpeed compiles its shared-memory collectives here, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        # A file needs no port, so nothing can take it between its choice and its use.
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
    )


def _leave() -> None:
    import torch.distributed

    torch.distributed.destroy_process_group()


def _filter(text: str) -> tuple[Any, ...]:
    from _pytest.config import parse_warning_filter

    return parse_warning_filter(text, escape=False)


def _load(path: str) -> ModuleType:
    """Import a test module by its file; what it imports beside itself is found there too."""
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_on_rank", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
