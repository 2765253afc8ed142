"""Ranks that take part in a collective call learn of each other's failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from tritonhybrid.errors import GROUP_LOST, EngineStateError, RankFailureError, explain
from tritonhybrid.weights.roll_call import Report, RollCall


class RankAgreement:
    """A meeting point for all ranks of a call; built on every rank at wrap time.

    Args:
        timeout_s: Seconds to wait for the others.

    Every rank must construct it (a process group is made) and meet equally often.
    """

    def __init__(self, timeout_s: float) -> None:
        # gloo, also beside NCCL: the flag lives on the host and must not wait for the GPU.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.timeout_s = timeout_s
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.roll_call = RollCall(self.group.group_name, timeout_s)
        self.is_lost = False

    def meet(self, error: BaseException | None) -> None:
        """Tell the others how this rank fared, and hear how they did.

        Args:
            error: What this rank is about to raise, or None.

        Raises:
            RankFailureError: Another rank failed and this one did not.
            EngineStateError: A rank stayed away or died.
        """
        if self.is_lost:
            if error is None:
                raise self.absence("an earlier call that ended with ranks out of step", ())
            return
        failed = torch.tensor([error is not None], dtype=torch.int64)
        messages: list[str | None] = [None] * self.world_size
        try:
            dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self.group)
            if int(failed) == 0:
                return
            mine = f"{type(error).__name__}: {error}" if error is not None else None
            dist.all_gather_object(messages, mine, group=self.group)
        except RuntimeError as silence:
            self.is_lost = True
            if error is not None:
                # What went wrong here says more than that nobody listens.
                return
            self.roll_call.report(Report(message=brief(silence)))
            reports = self.roll_call.wait()
            for rank, report in reports.items():
                if report.posted is not None:
                    raise RankFailureError(rank, report.message, is_group_lost=True) from silence
            silent = self.roll_call.silent(reports)
            raise self.absence(first_line(silence), silent) from silence
        if error is None:
            rank = next(rank for rank, message in enumerate(messages) if message is not None)
            raise RankFailureError(rank, str(messages[rank]))

    def absence(self, got: str, silent: Sequence[int]) -> EngineStateError:
        """The error of a call that not every rank took part in.

        Args:
            got: What was seen of it.
            silent: Ranks that leave no word.
        """
        if silent:
            got += f"; ranks that fell silent: {', '.join(map(str, silent))}"
        if self.roll_call.is_store_gone:
            got += "; the ranks' store is gone with its host, which is rank 0 as a rule"
        return EngineStateError(
            explain(
                "Every rank takes part in a ZeRO-3 call",
                expected=f"{self.world_size} ranks within sync_timeout_s = {self.timeout_s:g} s",
                got=got,
                hint="Make the same calls on every rank (an empty list of prompts is "
                f"allowed). {GROUP_LOST}",
            )
        )


class CollectiveCall:
    """One call that every rank takes part in: meetings on the way and one at the end.

    A context manager around the whole call. Without an agreement (one rank, or a
    strategy without collectives) it does nothing.

    Args:
        agreement: Where the ranks meet, or None.

    Attributes:
        on_met: Called after each meeting, failed ones too, with the ``time.perf_counter()``
            of its beginning and its seconds.
    """

    def __init__(self, agreement: RankAgreement | None) -> None:
        self._agreement = agreement
        self._is_over = agreement is None
        self.on_met: Callable[[float, float], None] = lambda start_s, seconds: None

    def __enter__(self) -> CollectiveCall:
        """Nothing yet: arguments are checked first."""
        return self

    def meet(self) -> None:
        """So far all is well on this rank; go on when that is so on every rank.

        Raises:
            RankFailureError: Another rank failed.
        """
        self._meet(None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Meet at the end, or at once if this rank failed.

        Raises:
            RankFailureError: Another rank failed and this one did not.
        """
        self._meet(error)
        self._is_over = True

    def _meet(self, error: BaseException | None) -> None:
        if self._is_over:
            return
        assert self._agreement is not None
        # A failed meeting is the last one: no rank waits for another after it.
        self._is_over = error is not None
        start = time.perf_counter()
        try:
            self._agreement.meet(error)
        except BaseException:
            self._is_over = True
            raise
        finally:
            self.on_met(start, time.perf_counter() - start)


def brief(error: BaseException) -> str:
    """An error's type and the first line of its text, for another rank's message."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text: torch appends its C++ stack to some."""
    return next(iter(str(error).strip().splitlines()), "")
