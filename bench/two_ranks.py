"""The comparison on several gloo ranks, one thread each, with a time-out that names the culprit."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from comparison import Contestant, Outcome, compare
from engines import free_port, join
from workloads import Workload

# Contestants of a workload for a dtype: (workload, dtype, rank) -> list; a module-level function,
# because it is sent to the ranks.
FieldOf = Callable[[Workload, str, int], list[Contestant]]


@dataclass(frozen=True)
class Job:
    """What every rank is sent."""

    field_of: FieldOf
    workload: Workload
    dtype: str
    rounds: int
    without: frozenset[str]


class Ranks:
    """Agreement through the default process group."""

    def synchronize(self) -> None:
        dist.barrier()

    def every(self, flag: bool) -> bool:
        return self._reduce(float(flag), dist.ReduceOp.MIN) == 1.0

    def slowest(self, seconds: float) -> float:
        return self._reduce(seconds, dist.ReduceOp.MAX)

    @staticmethod
    def _reduce(value: float, operation: Any) -> float:
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=operation)
        return float(tensor)


def compare_on_ranks(job: Job, *, hang_s: float) -> Outcome:
    """Run `job` on its ranks; a contestant that runs longer than `hang_s` is killed and left out.

    Raises:
        RuntimeError: a rank died, or the ranks hung before any contestant ran.
    """
    hung: dict[str, str] = {}
    while True:
        without = job.without | hung.keys()
        outcome, culprit = _attempt(
            Job(job.field_of, job.workload, job.dtype, job.rounds, frozenset(without)), hang_s
        )
        if outcome is not None:
            outcome.names.extend(hung)
            outcome.failures.update(hung)
            return outcome
        hung[culprit] = f"failed: no answer within {hang_s:.0f} s, ranks killed"


def _attempt(job: Job, hang_s: float) -> tuple[Outcome | None, str]:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "transformers"])
    messages = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(rank, port, job, messages), daemon=True)
        for rank in range(job.workload.ranks)
    ]
    for process in ranks:
        process.start()
    running = ""
    deadline = time.monotonic() + hang_s
    try:
        while True:
            try:
                kind, content = messages.get(timeout=1.0)
            except queue.Empty:
                dead = [process.exitcode for process in ranks if process.exitcode not in (None, 0)]
                if dead:
                    raise RuntimeError(
                        f"a rank died with exit code {dead[0]} in {running!r}"
                    ) from None
                if time.monotonic() > deadline:
                    if not running:
                        raise RuntimeError(f"the ranks did not start in {hang_s:.0f} s") from None
                    return None, running
                continue
            if kind == "outcome":
                return content, ""
            if kind == "error":
                raise RuntimeError(content)
            running, deadline = content, time.monotonic() + hang_s
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _rank_main(rank: int, port: int, job: Job, messages: Any) -> None:
    torch.set_num_threads(1)
    try:
        join(rank, job.workload.ranks, port, "cpu")

        def field_of(dtype: str) -> list[Contestant]:
            everyone = job.field_of(job.workload, dtype, rank)
            return [each for each in everyone if each.name not in job.without]

        def announce(name: str) -> None:
            if rank == 0:
                messages.put(("running", name))

        outcome = compare(field_of, job.dtype, job.rounds, Ranks(), announce)
        if rank == 0:
            messages.put(("outcome", outcome))
    except Exception as error:
        messages.put(("error", f"rank {rank}: {type(error).__name__}: {error}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
