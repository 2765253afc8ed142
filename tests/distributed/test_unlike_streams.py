"""Two ranks whose streams end differently, and whose paused rollouts have unlike amounts left."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import hybrid_engine, micro_step, ragged_prompts, tokens
from training_state import differences, snapshot

from tritonhybrid import Completion, SamplingParams
from tritonhybrid.runner import Runner

PROMPTS = ragged_prompts(3)
PARAMS = [SamplingParams(max_new_tokens=new, n=2, seed=3, ignore_eos=True) for new in (12, 3, 7)]

stages_0_and_3 = pytest.mark.parametrize("stage", [0, 3])


def rank() -> int:
    return torch.distributed.get_rank()


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def fail() -> None:
    raise ZeroDivisionError("on purpose")


def nothing() -> None:
    pass


def by_key(completions: list[Completion]) -> dict[tuple[int, int], list[int]]:
    return {(c.prompt_index, c.sample_index): c.token_ids for c in completions}


def caught(call: Callable[[], Any]) -> str:
    """The name and text of what a call raises."""
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def left_over(engine: Any, before: dict[str, Any]) -> list[str]:
    """What a call has not put back, pages and handlers included."""
    found = differences(before, snapshot(engine))
    state = engine.__dict__["_tritonhybrid"]
    if state.is_busy:
        found.append("busy")
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        found.append("the handler of SIGINT")
    if state.generation.blocks is not None and state.generation.blocks.num_used:
        found.append("pages in use")
    return found


def in_step(at: int, act: Callable[[], None], call: Callable[[], Any]) -> Any:
    """Call, and act before this rank's ``at``-th step from now."""
    original = Runner.execute
    count = 0

    def execute(self: Runner, step: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            act()
        return original(self, step)

    Runner.execute = execute
    try:
        return call()
    finally:
        Runner.execute = original


def goes_on(engine: Any) -> tuple[list[list[int]], float]:
    """A rollout and a training step after whatever happened."""
    return tokens(engine.rollout(PROMPTS, PARAMS)), micro_step(engine, 0)


def undisturbed(stage: int) -> tuple[list[list[int]], float]:
    return goes_on(hybrid_engine(stage))


# Streams.


def leave_a_stream(stage: int, how: str) -> dict[str, Any]:
    """Rank 1 leaves its stream after two completions, rank 0 takes all of them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = hybrid_engine(stage)
    before = snapshot(engine)
    got = []
    leave = {"break": nothing, "error": fail, "ctrl_c": press_ctrl_c, "ctrl_c in a step": nothing}

    def consume() -> None:
        with engine.rollout_stream(PROMPTS, PARAMS) as stream:
            for completion in stream:
                got.append(completion)
                if rank() == 1 and len(got) == 2 and how != "ctrl_c in a step":
                    leave[how]()
                    break

    act = press_ctrl_c if how == "ctrl_c in a step" and rank() == 1 else nothing
    error = caught(lambda: in_step(4, act, consume))
    return {
        "error": error,
        "got": by_key(got),
        "left": left_over(engine, before),
        "after": goes_on(engine),
    }


@stages_0_and_3
@pytest.mark.parametrize(
    ("how", "raised"),
    [
        ("break", ""),
        ("error", "ZeroDivisionError: on purpose"),
        ("ctrl_c", "KeyboardInterrupt: "),
        ("ctrl_c in a step", "KeyboardInterrupt: "),
    ],
)
def test_a_rank_that_leaves_its_stream_holds_nobody_up_and_an_error_reaches_all(
    ranks, stage, how, raised
):
    pool = ranks(2)
    stays, leaves = pool.run(leave_a_stream, stage, how)
    assert leaves["error"] == (raised or "nothing")
    assert len(leaves["got"]) == 2
    told = f"RankFailureError: rank 1 failed during a collective rollout: {raised}"
    is_told = bool(raised) and stage == 3
    assert stays["error"].startswith(told if is_told else "nothing")
    # What the other had by then is whole.
    assert len(stays["got"]) == 6
    for result, expected in zip((stays, leaves), pool.run(undisturbed, stage), strict=True):
        assert result["left"] == []
        assert result["after"] == expected
        whole = dict(zip([(p, s) for p in range(3) for s in range(2)], expected[0], strict=True))
        assert result["got"] == {key: whole[key] for key in result["got"]}


# Paused rollouts.


def spend_unlike_budgets(stage: int) -> dict[str, Any]:
    """Rank 0 has no budget and nothing to resume, rank 1 resumes three times."""
    engine = hybrid_engine(stage)
    out = engine.rollout(PROMPTS, PARAMS, token_budget=None if rank() == 0 else 10)
    has_paused = [out.paused is not None]
    pieces = by_key(out.completions)
    for budget in (10, 10, None):
        out = engine.resume(out.paused, token_budget=budget)
        has_paused.append(out.paused is not None)
        pieces |= by_key(out.completions)
    return {
        "has_paused": has_paused,
        "tokens": list(pieces.values()),
        "loss": micro_step(engine, 0),
    }


@stages_0_and_3
def test_a_budget_spent_on_one_rank_only_is_resumed_beside_ranks_with_nothing_left(ranks, stage):
    pool = ranks(2)
    results = pool.run(spend_unlike_budgets, stage)
    assert results[0]["has_paused"] == [False] * 4
    assert results[1]["has_paused"] == [True, True, True, False]
    for result, expected in zip(results, pool.run(undisturbed, stage), strict=True):
        assert (result["tokens"], result["loss"]) == expected


def fail_while_resuming(stage: int, act: str) -> dict[str, Any]:
    """Rank 1 breaks off in a resumption; both ranks then resume the same again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = hybrid_engine(stage)
    before = snapshot(engine)
    out = engine.rollout(PROMPTS, PARAMS, token_budget=20)
    pieces = by_key(out.completions)
    acts = {"error": fail, "ctrl_c": press_ctrl_c}
    # By then two of rank 1's sequences have ended.
    own = acts[act] if rank() == 1 else nothing
    error = caught(lambda: in_step(6, own, lambda: engine.resume(out.paused)))
    left = left_over(engine, before)
    again = ""
    try:
        pieces |= by_key(engine.resume(out.paused).completions)
    except Exception as refused:
        again = str(refused)
    return {
        "error": error,
        "left": left,
        "again": again,
        "tokens": list(pieces.values()),
        "loss": micro_step(engine, 0),
    }


@pytest.mark.parametrize(
    ("act", "raised"),
    [("error", "ZeroDivisionError: on purpose"), ("ctrl_c", "KeyboardInterrupt: ")],
)
def test_a_resumption_that_fails_on_one_rank_is_tried_again_on_all(ranks, act, raised):
    pool = ranks(2)
    good, bad = pool.run(fail_while_resuming, 3, act)
    assert bad["error"] == raised
    assert good["error"].startswith(
        f"RankFailureError: rank 1 failed during a collective rollout: {raised}"
    )
    for result, expected in zip((good, bad), pool.run(undisturbed, 3), strict=True):
        assert result["left"] == []
        assert result["again"] == ""
        assert (result["tokens"], result["loss"]) == expected


def fail_beside_a_pause() -> tuple[str, list[str]]:
    """Rank 0 spends its budget in a call that fails on rank 1."""
    engine = hybrid_engine(3)
    before = snapshot(engine)
    act = fail if rank() == 1 else nothing
    budget = 10 if rank() == 0 else None
    error = caught(
        lambda: in_step(3, act, lambda: engine.rollout(PROMPTS, PARAMS, token_budget=budget))
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return error, left_over(engine, before)


def test_what_a_failed_call_has_paused_keeps_no_pages(ranks):
    (heard, left), (failed, left_there) = ranks(2).run(fail_beside_a_pause)
    assert failed == "ZeroDivisionError: on purpose"
    assert heard.startswith("RankFailureError: rank 1 failed")
    assert left == left_there == []
