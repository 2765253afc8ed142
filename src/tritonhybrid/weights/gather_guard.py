"""DeepSpeed's gathers held to our time limit, and what a rank raises when one fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tritonhybrid.errors import GROUP_LOST, RankFailureError
from tritonhybrid.weights.agreement import RankAgreement, brief
from tritonhybrid.weights.roll_call import Report

# NCCL's own watchdog ends the process; ours should have spoken before.
_WATCHDOG_DELAY_S = 60.0
_LONGEST_NAP_S = 0.05
_BARRIER_S = 2.0
# Of a message that nobody sends.
_TAG = 2**20 + 7


class GatherGuard:
    """Watches over the collectives that DeepSpeed posts while weights are gathered.

    A failure between two collectives is no business of its own: the rank goes on
    taking part and raises at the end. A failure inside one puts the ranks out of
    step for good; this sees to it that every rank hears of it within the time limit.

    Args:
        agreement: Where the ranks meet otherwise.
        parameters: ZeRO-3 parameters; the groups they are gathered on are theirs.
    """

    def __init__(self, agreement: RankAgreement, parameters: Iterable[nn.Parameter]) -> None:
        self._agreement = agreement
        groups = (getattr(p, "ds_process_group", None) for p in parameters)
        self._groups = list({id(group): group for group in groups if group is not None}.values())

    @contextmanager
    def time_limit(self) -> Iterator[None]:
        """Give collectives posted inside the agreement's time-out instead of their group's."""
        limit = self._agreement.timeout_s
        before: list[tuple[Any, timedelta]] = []
        try:
            for group in self._groups:
                for backend, delay_s in _backends(group):
                    before.append((backend, backend.options._timeout))
                    backend._set_default_timeout(timedelta(seconds=limit + delay_s))
            yield
        finally:
            for backend, timeout in before:
                backend._set_default_timeout(timeout)

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """A block whose work is collective; an error that leaves it is every rank's.

        Raises:
            RankFailureError: The rank that failed, died or hangs is known.
            EngineStateError: It is not.
        """
        try:
            yield
        except BaseException as error:
            raised = self._judge(error)
            if raised is error:
                raise
            raise raised from error

    def await_device(self, device: torch.device) -> None:
        """Wait until a CUDA device has done its part; elsewhere the host has waited already.

        Raises:
            RuntimeError: It has not within the time limit, or another rank has failed.
        """
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self.wait_until(event.query)

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        """Wait, but not beyond the time limit, nor for a rank that has failed.

        Raises:
            RuntimeError: It is not done.
        """
        agreement = self._agreement
        deadline = time.monotonic() + agreement.timeout_s
        nap_s = 1e-4
        while not is_done():
            if nap_s == _LONGEST_NAP_S and agreement.roll_call.reports():
                raise RuntimeError("another rank has failed")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the device waited {agreement.timeout_s:g} s for other ranks")
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)

    def _judge(self, error: BaseException) -> BaseException:
        """Find out how the others fared; what to raise here."""
        agreement = self._agreement
        mine, said = self._num_posted(), brief(error)
        agreement.roll_call.report(Report(message=said, posted=mine))
        reports = agreement.roll_call.wait()
        if self._are_in_step(list(reports.values())):
            agreement.roll_call.start_afresh()
            return error
        agreement.is_lost = True
        for group in (*self._groups, agreement.group):
            _hang_up(group)
        # Those that waited for this rank wake up now.
        reports = agreement.roll_call.wait()
        silent = agreement.roll_call.silent(reports)
        posted = {r: report.posted for r, report in reports.items() if report.posted is not None}
        is_behind = mine < max(posted.values())
        if not _is_of_communication(error) or (is_behind and not silent):
            error.add_note(GROUP_LOST)
            return error
        if len(silent) == 1:
            died = f"it fell silent (died, or hangs) while weights were gathered: {said}."
            return RankFailureError(silent[0], died, is_group_lost=True)
        first = min(posted, key=lambda rank: posted[rank])
        if silent or posted[first] == mine:
            return agreement.absence(said, silent)
        return RankFailureError(first, reports[first].message, is_group_lost=True)

    def _num_posted(self) -> int:
        return sum(group._get_sequence_number_for_group() for group in self._groups)

    def _are_in_step(self, reports: Collection[Report]) -> bool:
        """Whether all ranks failed alike, with the groups still good."""
        if len(reports) < self._agreement.world_size or len({r.posted for r in reports}) > 1:
            return False
        barriers = [dist.barrier(group=group, async_op=True) for group in self._groups]
        deadline = time.monotonic() + _BARRIER_S
        while not all(barrier.is_completed() for barrier in barriers):
            if time.monotonic() > deadline:
                return False
            time.sleep(1e-3)
        try:
            for barrier in barriers:
                barrier.wait()
        except RuntimeError:
            return False
        return True


def _backends(group: Any) -> Iterator[tuple[Any, float]]:
    """Backends of a group whose time-out can be set, and how much longer than ours it must be."""
    for device in group._device_types:
        backend = group._get_backend(device)
        if isinstance(backend, dist.ProcessGroupGloo):
            yield backend, 0.0
        elif dist.is_nccl_available() and isinstance(backend, dist.ProcessGroupNCCL):
            yield backend, _WATCHDOG_DELAY_S


def _hang_up(group: Any) -> None:
    """Leave a group that is out of step, so that nobody waits in it for this rank."""
    with suppress(RuntimeError):
        group.abort()
    # torch's gloo has no abort (an empty function up to 2.13), but a receive that times out
    # closes the connections to all ranks.
    if any(isinstance(backend, dist.ProcessGroupGloo) for backend, _ in _backends(group)):
        other = (group.rank() + 1) % group.size()
        with suppress(RuntimeError):
            group.recv([torch.empty(1)], other, _TAG).wait(timedelta(milliseconds=1))


def _is_of_communication(error: BaseException) -> bool:
    """Whether torch says that a collective failed; gloo does so by a bare RuntimeError."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)
