"""Pools of gloo ranks, kept for the whole session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The harness is imported by name, here and on every rank.
sys.path.insert(0, str(Path(__file__).parent))

from ranks import RankPool


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[Callable[[int], RankPool]]:
    """Return the pool of a world size, warnings being errors there as here."""
    filters = pytestconfig.getini("filterwarnings")
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, filters)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()
