"""One comparison in processes of its own, a rank each; who hangs or dies is named and left out."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from comparison import Field, Outcome, compare
from engines import free_port, join
from workloads import Workload

# The field of a workload for a dtype on a rank; picklable, because it is sent to the ranks.
FieldOf = Callable[[Workload, str, int], Field]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is sent.

    Attributes:
        threads: of torch, a rank.
        without: contestants that hung or died in an earlier attempt.
    """

    field_of: FieldOf
    workload: Workload
    dtype: str
    rounds: int
    device: str
    threads: int
    without: frozenset[str] = frozenset()


class Ranks:
    """Agreement through the default process group."""

    def __init__(self, device: str) -> None:
        self._device = device

    def synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def every(self, flag: bool) -> bool:
        return self._reduce(float(flag), dist.ReduceOp.MIN) == 1.0

    def slowest(self, seconds: float) -> float:
        return self._reduce(seconds, dist.ReduceOp.MAX)

    def _reduce(self, value: float, operation: Any) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=operation)
        return float(tensor)


@dataclass(frozen=True)
class Attempt:
    """An outcome, or the contestant that ended the attempt and how."""

    outcome: Outcome | None
    culprit: str = ""
    how: str = ""


def compare_on_ranks(job: Job, *, hang_s: float) -> Outcome:
    """Run `job` on its ranks; a contestant that hangs `hang_s` seconds or dies is left out.

    Raises:
        RuntimeError: the reference failed, or the ranks ended before any contestant ran.
    """
    lost: dict[str, str] = {}
    while True:
        attempt = _attempt(replace(job, without=job.without | lost.keys()), hang_s)
        if attempt.outcome is not None:
            attempt.outcome.names.extend(lost)
            attempt.outcome.failures.update(lost)
            return attempt.outcome
        if not attempt.culprit or attempt.culprit in lost:
            raise RuntimeError(f"{job.workload.name} {job.dtype}: {attempt.how}")
        lost[attempt.culprit] = f"failed: {attempt.how}"


def _attempt(job: Job, hang_s: float) -> Attempt:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "transformers"])
    port = free_port()
    ranks, ends = [], []
    for rank in range(job.workload.ranks):
        # A pipe, not a queue: what a rank said before it died has arrived.
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(rank, port, job, theirs), daemon=True)
        process.start()
        theirs.close()
        ranks.append(process)
        ends.append(ours)
    try:
        return _listen(job, ranks, ends, hang_s)
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _listen(job: Job, ranks: list[Any], ends: list[Connection], hang_s: float) -> Attempt:
    running = ""
    open_ends = list(ends)
    deadline = time.monotonic() + hang_s
    while time.monotonic() < deadline:
        for end in wait(open_ends, timeout=1.0):
            try:
                kind, content = end.recv()
            except EOFError:
                open_ends.remove(end)
                died = _death(ranks)
                if died or not open_ends:
                    return Attempt(None, running, died or "the ranks ended without an outcome")
                continue
            if kind == "outcome":
                return Attempt(content)
            if kind == "error":
                # Where a rank died, the others' errors are only the echo of that.
                died = _death(ranks)
                if died:
                    return Attempt(None, running, died)
                raise RuntimeError(content)
            running, deadline = content, time.monotonic() + hang_s
            # Minutes pass without a table: say who is at it.
            print(f"{job.workload.name} {job.dtype}: {running}", file=sys.stderr, flush=True)
    return Attempt(None, running, f"no answer within {hang_s:.0f} s, killed")


def _death(ranks: list[Any]) -> str:
    """Return which rank died and how; empty where all run or ended of themselves."""
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        for rank, process in enumerate(ranks):
            if process.exitcode not in (None, 0):
                return f"rank {rank} died with exit code {process.exitcode}"
        time.sleep(0.05)
    return ""


def _rank_main(rank: int, port: int, job: Job, messages: Connection) -> None:
    torch.set_num_threads(job.threads)
    # Both write a line a call, between the tables.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    try:
        join(rank, job.workload.ranks, port, job.device)

        def field_of(dtype: str) -> Field:
            field = job.field_of(job.workload, dtype, rank)
            kept = [each for each in field.contestants if each.name not in job.without]
            if field.contestants[0].name in job.without:
                raise RuntimeError(f"the reference {field.contestants[0].name} did not answer")
            return replace(field, contestants=kept)

        def announce(name: str) -> None:
            if rank == 0:
                messages.send(("running", name))

        outcome = compare(field_of, job.dtype, job.rounds, Ranks(job.device), announce)
        if rank == 0:
            messages.send(("outcome", outcome))
    except Exception as error:
        messages.send(("error", f"rank {rank}: {type(error).__name__}: {error}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
