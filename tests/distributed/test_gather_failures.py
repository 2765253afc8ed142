"""One of two ranks fails while ZeRO-3 weights are gathered: between collectives, or inside one."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.comm
import pytest
import torch
from deepspeed.runtime.zero import GatheredParameters
from failures import (
    GREEDY,
    PROMPTS,
    Caught,
    acting,
    aftermath,
    caught,
    fail,
    press_ctrl_c,
    rank,
    rollout_beside_hf,
)
from models import hybrid_engine, micro_step
from ranks import RankError, RankPool

from tritonhybrid import HybridConfig, RankFailureError
from tritonhybrid.runner import Runner
from tritonhybrid.weights.arena import Arena
from tritonhybrid.weights.gather_guard import GatherGuard
from tritonhybrid.weights.roll_call import RollCall

IDS = torch.tensor([PROMPTS[1][:4]])

FAILED_1 = "RankFailureError: rank 1 failed during a collective rollout:"
LOST = "The process group is lost: start the ranks again"

# Calls of a wrapped engine that gather: our loop, HF's contract over it, and HF's own decoding.
CALLS: dict[str, Callable[[Any], Any]] = {
    "rollout": lambda engine: engine.rollout(PROMPTS, GREEDY),
    "generate": lambda engine: engine.generate(IDS, max_new_tokens=3, do_sample=False),
    "beams": lambda engine: engine.generate(IDS, max_new_tokens=3, do_sample=False, num_beams=2),
    "hf loop": lambda engine: engine.rollout(PROMPTS, GREEDY),
}


@pytest.fixture
def lost_ranks(pytestconfig: pytest.Config) -> Iterator[Callable[[int], RankPool]]:
    """Ranks that are not used again: their process group does not survive the test."""
    pools = []

    def pool(world_size: int) -> RankPool:
        pools.append(RankPool(world_size, pytestconfig.getini("filterwarnings")))
        return pools[-1]

    yield pool
    for started in pools:
        started.kill()


def engine_for(call: str, timeout_s: float) -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    overrides = {"rope_parameters": rope} if call == "hf loop" else {}
    # Each layer a bucket of its own: the fourth and last bucket is the last layer's.
    config = HybridConfig(sync_timeout_s=timeout_s, tp_gather_partition_size=1)
    return hybrid_engine(3, config=config, **overrides)


# Between collectives.


def fail_between_collectives(call: str, kind: str) -> dict[str, Any]:
    """Rank 1 fails at one point or another of the gather; both go on to train and generate."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = engine_for(call, timeout_s=30.0)
    losses = [micro_step(engine, 0)]
    points = {
        "allocation": (Arena, "__init__", 1, fail),
        "first copy": (Arena, "store", 1, fail),
        "last copy": (Arena, "store", 4, fail),
        "ctrl_c in the first copy": (Arena, "store", 1, press_ctrl_c),
        "ctrl_c in a collective": (deepspeed.comm, "all_gather_into_tensor", 6, press_ctrl_c),
        "ctrl_c in the partitioning": (GatheredParameters, "__exit__", 2, press_ctrl_c),
    }
    with acting(*points[kind]):
        found = aftermath(engine, lambda: CALLS[call](engine))
    losses += [micro_step(engine, index) for index in (1, 2)]
    return {**found, "losses": losses, **rollout_beside_hf(engine)}


def losses_without_calls(call: str) -> list[float]:
    engine = engine_for(call, timeout_s=30.0)
    return [micro_step(engine, index) for index in range(3)]


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("rollout", "allocation"),
        ("rollout", "first copy"),
        ("rollout", "last copy"),
        ("rollout", "ctrl_c in the first copy"),
        ("rollout", "ctrl_c in a collective"),
        ("rollout", "ctrl_c in the partitioning"),
        ("generate", "first copy"),
        ("beams", "first copy"),
        ("hf loop", "first copy"),
    ],
)
def test_a_failure_between_collectives_is_named_and_all_ranks_train_on(ranks, call, kind):
    pool = ranks(2)
    good, bad = pool.run(fail_between_collectives, call, kind)
    own = "KeyboardInterrupt:" if "ctrl_c" in kind else "ZeroDivisionError: on purpose"
    assert bad["error"].startswith(own)
    assert good["error"].startswith(f"{FAILED_1} {own}")
    for result, losses in zip((good, bad), pool.run(losses_without_calls, call), strict=True):
        assert LOST not in result["error"]
        assert result["seconds"] < 10
        assert result["changed"] == []
        assert result["losses"] == losses
        assert result["tokens"] == result["hf_tokens"]


def fail_alike() -> dict[str, Any]:
    """Both ranks fail inside DeepSpeed's gather, at the same collective."""
    engine = engine_for("rollout", timeout_s=30.0)
    losses = [micro_step(engine, 0)]
    original = GatheredParameters.__enter__
    count = 0

    def enter(self: GatheredParameters) -> None:
        nonlocal count
        count += 1
        if count == 3:
            fail()
        original(self)

    GatheredParameters.__enter__ = enter
    try:
        found = aftermath(engine, lambda: engine.rollout(PROMPTS, GREEDY))
    finally:
        GatheredParameters.__enter__ = original
    losses += [micro_step(engine, index) for index in (1, 2)]
    return {**found, "losses": losses}


def test_ranks_that_fail_alike_inside_a_gather_stay_in_step(ranks):
    pool = ranks(2)
    results = pool.run(fail_alike)
    for result, losses in zip(results, pool.run(losses_without_calls, "rollout"), strict=True):
        assert result["error"] == "ZeroDivisionError: on purpose"
        assert result["seconds"] < 10
        assert result["changed"] == []
        assert result["losses"] == losses


# Inside a collective.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(8)


def fail_inside_a_collective(call: str, kind: str, timeout_s: float) -> dict[str, Any]:
    """Rank 1 fails, dies or hangs at a point of the gather."""
    engine = engine_for(call, timeout_s)
    points = {
        "before the bucket": (GatheredParameters, "__enter__", 2, fail),
        "within the bucket": (deepspeed.comm, "all_gather_into_tensor", 6, fail),
        "after the bucket": (GatheredParameters, "__exit__", 2, fail),
        "killed": (deepspeed.comm, "all_gather_into_tensor", 6, die),
        "asleep": (deepspeed.comm, "all_gather_into_tensor", 6, sleep),
        "asleep between": (Arena, "store", 2, sleep),
    }
    with acting(*points[kind]):
        found = aftermath(engine, lambda: CALLS[call](engine))
    return {**found, "next": caught(lambda: engine.rollout(PROMPTS, GREEDY))}


def check_lost(result: dict[str, Any], error: str, seconds: float) -> None:
    assert result["error"].startswith(error)
    assert LOST in result["error"]
    assert result["seconds"] < seconds
    assert result["changed"] == []
    next_error, next_seconds = result["next"]
    assert next_error.startswith("EngineStateError: Every rank takes part in a ZeRO-3 call")
    assert LOST in next_error
    assert next_seconds < 1


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("rollout", "before the bucket"),
        ("rollout", "within the bucket"),
        ("rollout", "after the bucket"),
        ("generate", "within the bucket"),
        ("hf loop", "within the bucket"),
    ],
)
def test_an_exception_inside_a_collective_reaches_every_rank_at_once(lost_ranks, call, kind):
    good, bad = lost_ranks(2).run(fail_inside_a_collective, call, kind, 60.0)
    check_lost(bad, "ZeroDivisionError: on purpose", 10)
    check_lost(good, f"{FAILED_1} ZeroDivisionError: on purpose", 10)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_killed_inside_a_collective_is_named(lost_ranks, world_size):
    with pytest.raises(RankError, match="rank 1: the process died") as error:
        lost_ranks(world_size).run(fail_inside_a_collective, "rollout", "killed", 60.0)
    assert sorted(error.value.results) == [r for r in range(world_size) if r != 1]
    for survivor in error.value.results.values():
        check_lost(survivor, f"{FAILED_1} it fell silent", 10)


class GoneStore:
    """A store whose host has died."""

    def check(self, *args: Any) -> bool:
        raise torch.distributed.DistNetworkError("Broken pipe")

    set = get = check


def lose_the_store_and_a_rank() -> dict[str, Any]:
    RollCall._store = property(lambda self: GoneStore(), lambda self, store: None)
    return fail_inside_a_collective("rollout", "killed", 60.0)


def test_where_the_store_dies_too_no_rank_is_accused(lost_ranks):
    with pytest.raises(RankError, match="rank 1: the process died") as error:
        lost_ranks(2).run(lose_the_store_and_a_rank)
    (survivor,) = error.value.results.values()
    check_lost(survivor, "EngineStateError: Every rank takes part in a ZeRO-3 call: ", 10)
    assert "store is gone with its host" in survivor["error"]
    assert "fell silent" not in survivor["error"]


@pytest.mark.parametrize("kind", ["asleep", "asleep between"])
def test_a_rank_that_hangs_is_named_within_the_timeout(lost_ranks, kind):
    waited, hung = lost_ranks(2).run(fail_inside_a_collective, "rollout", kind, 2.0)
    check_lost(waited, f"{FAILED_1} it fell silent", 6)
    # It wakes up to a group that the other has left.
    check_lost(hung, "EngineStateError: Every rank takes part in a ZeRO-3 call: ", 12)


def wait_for_a_device(kind: str) -> Caught:
    """As with NCCL: collectives are posted, and the host waits for a device that never ends."""
    engine = engine_for("rollout", timeout_s=2.0 if kind == "asleep" else 60.0)
    source = engine.__dict__["_tritonhybrid"].generation.source
    guard = GatherGuard(source.agreement, engine.module.parameters())

    def gather() -> None:
        with guard.collectives():
            if rank() == 1:
                sleep() if kind == "asleep" else fail()
            work = torch.distributed.all_gather_into_tensor(
                torch.empty(2), torch.ones(1), async_op=True
            )
            guard.wait_until(lambda: False)
            work.wait()

    return caught(gather)


@pytest.mark.parametrize(("kind", "seconds"), [("asleep", 6), ("failed", 10)])
def test_a_device_that_waits_for_a_failed_rank_is_given_up(lost_ranks, kind, seconds):
    (error, waited_s), _ = lost_ranks(2).run(wait_for_a_device, kind)
    said = "it fell silent" if kind == "asleep" else "ZeroDivisionError: on purpose"
    assert error.startswith(f"{FAILED_1} {said}")
    assert LOST in error
    assert waited_s < seconds


@pytest.mark.parametrize("is_group_lost", [False, True])
def test_a_rank_failure_crosses_processes(is_group_lost):
    error = RankFailureError(3, "ValueError: on purpose", is_group_lost)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.rank, copy.message, copy.is_group_lost) == (3, error.message, is_group_lost)
    assert str(copy) == str(error)
    assert (LOST in str(copy)) == is_group_lost
    assert ("call again" in str(copy)) != is_group_lost


# After the gather.


def die_in_a_step() -> dict[str, Any]:
    engine = engine_for("rollout", timeout_s=60.0)
    with acting(Runner, "execute", 3, die):
        found = aftermath(engine, lambda: engine.rollout(PROMPTS, GREEDY))
    return {**found, "next": caught(lambda: engine.rollout(PROMPTS, GREEDY))}


def test_a_rank_killed_while_it_decodes_is_an_error_on_the_others(lost_ranks):
    with pytest.raises(RankError, match="rank 1: the process died") as error:
        lost_ranks(2).run(die_in_a_step)
    (survivor,) = error.value.results.values()
    check_lost(survivor, "EngineStateError: Every rank takes part in a ZeRO-3 call: ", 10)
    assert "ranks that fell silent: 1" in survivor["error"]
