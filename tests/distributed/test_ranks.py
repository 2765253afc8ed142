"""The harness itself: a hang ends in stacks, a failure in each rank's traceback."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, RankPool


@pytest.fixture(scope="module")
def pool(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    pool = RankPool(2, pytestconfig.getini("filterwarnings"))
    yield pool
    pool.close()


def sum_over_ranks(number: float) -> float:
    total = torch.tensor(number * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return total.item()


def process_id() -> int:
    return os.getpid()


def wait_for_nobody() -> None:
    if dist.get_rank() == 1:
        linger_on_purpose()


def linger_on_purpose() -> None:
    time.sleep(1000)


def raise_on_one_rank() -> str:
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    return "fine"


def die_on_one_rank() -> str:
    if dist.get_rank() == 1:
        os._exit(3)
    return "fine"


def warn() -> None:
    warnings.warn("on purpose", UserWarning, stacklevel=1)


def test_ranks_form_one_group_and_answer_by_rank(pool):
    assert pool.run(sum_over_ranks, 2.0) == [6.0, 6.0]
    assert len(set(pool.run(process_id))) == 2
    assert pool.run(process_id) == pool.run(process_id)


def test_a_hang_is_killed_and_shows_the_stack_of_the_rank_that_hangs(pool):
    start = time.monotonic()
    with pytest.raises(
        RankError, match=r"rank 1: still running[\s\S]*in linger_on_purpose"
    ) as error:
        pool.run(wait_for_nobody, timeout_s=1.0)
    assert time.monotonic() - start < 10
    assert "rank 0" not in str(error.value)
    assert pool.run(sum_over_ranks, 1.0) == [3.0, 3.0]


def test_a_failure_names_the_rank_and_its_traceback(pool):
    with pytest.raises(RankError, match="in raise_on_one_rank[\\s\\S]*ValueError: on purpose"):
        pool.run(raise_on_one_rank)
    assert pool.run(sum_over_ranks, 1.0) == [3.0, 3.0]


def test_a_rank_that_dies_is_noticed(pool):
    with pytest.raises(RankError, match="rank 1: the process died"):
        pool.run(die_on_one_rank)
    assert pool.run(sum_over_ranks, 1.0) == [3.0, 3.0]


def test_warnings_are_errors_on_ranks_too(pool):
    with pytest.raises(RankError, match="UserWarning: on purpose"):
        pool.run(warn)
