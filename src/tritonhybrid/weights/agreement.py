"""Ranks that take part in a collective call learn of each other's failures."""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from tritonhybrid.errors import EngineStateError, RankFailureError, explain


class RankAgreement:
    """A meeting point for all ranks of a call; built on every rank at wrap time.

    Args:
        timeout_s: Seconds to wait for the others.

    Every rank must construct it (a process group is made) and meet equally often.
    """

    def __init__(self, timeout_s: float) -> None:
        # gloo, also beside NCCL: the flag lives on the host and must not wait for the GPU.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._timeout_s = timeout_s
        self._rank = dist.get_rank()
        self._world = dist.get_world_size()

    def meet(self, error: BaseException | None) -> None:
        """Tell the others how this rank fared, and hear how they did.

        Args:
            error: What this rank is about to raise, or None.

        Raises:
            RankFailureError: Another rank failed and this one did not.
            EngineStateError: A rank stayed away or died.
        """
        failed = torch.tensor([self._rank + 1 if error is not None else 0])
        try:
            dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as silence:
            if error is not None:
                # What went wrong here says more than that nobody listens.
                return
            raise EngineStateError(
                explain(
                    "Every rank takes part in a ZeRO-3 call",
                    expected=f"{self._world} ranks within sync_timeout_s = {self._timeout_s:g} s",
                    got=str(silence).strip().splitlines()[0],
                    hint="Make the same calls on every rank (an empty list of prompts is "
                    "allowed), or raise sync_timeout_s; then start the ranks again.",
                )
            ) from silence
        if int(failed) == 0:
            return
        messages: list[str | None] = [None] * self._world
        mine = f"{type(error).__name__}: {error}" if error is not None else None
        dist.all_gather_object(messages, mine, group=self._group)
        if error is None:
            rank = next(rank for rank, message in enumerate(messages) if message is not None)
            raise RankFailureError(rank, str(messages[rank]))


class CollectiveCall:
    """One call that every rank takes part in: a meeting before it and one after.

    A context manager around the whole call. Without an agreement (one rank, or a
    strategy without collectives) it does nothing.

    Args:
        agreement: Where the ranks meet, or None.
    """

    def __init__(self, agreement: RankAgreement | None) -> None:
        self._agreement = agreement
        self._is_over = agreement is None

    def __enter__(self) -> CollectiveCall:
        """Nothing yet: arguments are checked first."""
        return self

    def start(self) -> None:
        """Every rank's arguments are in order; collectives may begin.

        Raises:
            RankFailureError: Another rank refused its arguments.
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
        try:
            self._agreement.meet(error)
        except BaseException:
            self._is_over = True
            raise
