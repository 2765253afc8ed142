"""Word from each rank once collectives have failed, through a store that still works then."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

# How often a waiting rank looks, and for how long: ranks that fail alike fail within moments.
_PERIOD_S = 0.02
_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank says of itself.

    Args:
        message: Its error, in one line.
        posted: Collectives it has posted on the group that failed: the others wait for
            the rank that has posted fewest. None: it only waited, in a meeting.
    """

    message: str
    posted: int | None = None


class RollCall:
    """Who has reported, and who is silent.

    Args:
        name: Of the meeting point; the same on every rank.
        timeout_s: Never waits longer than this.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._store = _get_default_store()
        self._name = name
        self._world = dist.get_world_size()
        self._rank = dist.get_rank()
        self._grace_s = min(_GRACE_S, timeout_s)
        self._round = 0
        self._own: dict[int, Report] = {}
        self.is_store_gone = False

    def report(self, report: Report) -> None:
        """Leave this rank's word; it stands until :meth:`start_afresh`."""
        self._own = {self._rank: report}
        try:
            self._store.set(self._key(self._rank), json.dumps(asdict(report)))
        except RuntimeError:
            self.is_store_gone = True

    def reports(self) -> dict[int, Report]:
        """Word that the ranks have left so far."""
        others = (rank for rank in range(self._world) if rank not in self._own)
        found = {rank: report for rank in others if (report := self._read(rank)) is not None}
        return {**self._own, **found}

    def wait(self) -> dict[int, Report]:
        """Word of all ranks, or of those that leave it within a moment."""
        deadline = time.monotonic() + self._grace_s
        while len(found := self.reports()) < self._world and time.monotonic() < deadline:
            time.sleep(_PERIOD_S)
        return found

    def silent(self, reports: Mapping[int, Report]) -> list[int]:
        """Ranks that left no word; none where word can't be left any more."""
        if self.is_store_gone:
            return []
        return [rank for rank in range(self._world) if rank not in reports]

    def start_afresh(self) -> None:
        """Forget what was reported; every rank must call this."""
        self._round += 1
        self._own = {}

    def _read(self, rank: int) -> Report | None:
        # Asked again, torch would print a warning of thirty lines each time.
        if self.is_store_gone:
            return None
        key = self._key(rank)
        try:
            return Report(**json.loads(self._store.get(key))) if self._store.check([key]) else None
        except RuntimeError:
            self.is_store_gone = True
            return None

    def _key(self, rank: int) -> str:
        return f"tritonhybrid/{self._name}/{self._round}/{rank}"
