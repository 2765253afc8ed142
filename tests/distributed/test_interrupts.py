"""Ctrl-C at hundreds of moments of a rollout, between any two bytecodes and at any time."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from models import hf_greedy, hybrid_engine, micro_step, plain_copy, ragged_prompts, tokens
from training_state import differences, snapshot

import tritonhybrid
from tritonhybrid import HybridConfig, SamplingParams
from tritonhybrid.interrupts import InterruptsHeld

PACKAGE = str(Path(tritonhybrid.__file__).parent)
PROMPTS = ragged_prompts(2)
PARAMS = SamplingParams(max_new_tokens=3, temperature=0.8, top_p=0.9, n=2, seed=3)
GREEDY = SamplingParams(max_new_tokens=3, temperature=0.0)


def state_of(engine: Any) -> Any:
    return engine.__dict__["_tritonhybrid"]


def forget(engine: Any) -> None:
    """Keep nothing from earlier calls."""
    state_of(engine).generation._verdicts.clear()
    state_of(engine).generation.release()


def left_over(engine: Any, before: dict[str, Any]) -> list[str]:
    """What an interrupted call has not put back, pages and handlers included."""
    state = state_of(engine)
    found = differences(before, snapshot(engine))
    if state.is_busy:
        found.append("busy")
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        found.append("the handler of SIGINT")
    blocks = state.generation.blocks
    if blocks is not None and blocks.num_used:
        found.append(f"{blocks.num_used} pages in use")
    return found


# Between any two bytecodes of ours.


def roll_out_cold(engine: Any, press_at: int) -> tuple[int, Any]:
    """Roll out with nothing kept from before; Ctrl-C before the n-th bytecode of ours.

    Returns:
        Bytecodes that our package and contextlib ran, and the tokens, or None if the call
        was interrupted.
    """
    forget(engine)
    count = 0
    result = None

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        code = frame.f_code
        # Nobody hears what is raised where Python closes a generator.
        is_ours = code.co_filename.startswith(PACKAGE) or code.co_filename == contextlib.__file__
        if not is_ours or code.co_name == "<genexpr>":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == press_at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        result = tokens(engine.rollout(PROMPTS, PARAMS))
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count, result


def interrupt_everywhere(stage: int) -> dict[str, Any]:
    """Interrupt one rollout after another, each some bytecodes later; train once in a while."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = hybrid_engine(stage, num_hidden_layers=1, lr=0.0, attention_dropout=0.0)
    loss = micro_step(engine, 0)
    # The first call announces what later ones don't.
    roll_out_cold(engine, 0)
    codes, expected = roll_out_cold(engine, 0)
    spoiled, losses, finished = [], [], []
    # A prime number of moments, so that a loop's turns are not all met at the same bytecode.
    moments = list(range(1, codes + 1, max(1, codes // 211)))
    for index, moment in enumerate(moments):
        before = snapshot(engine)
        _, result = roll_out_cold(engine, moment)
        changed = left_over(engine, before)
        if changed:
            spoiled.append((moment, changed[:3]))
            break
        if result is not None:
            finished.append(moment)
        if index % 20 == 0:
            losses.append(micro_step(engine, 0))
    return {
        "moments": len(moments),
        "spoiled": spoiled,
        "finished": finished,
        "losses": {loss, *losses, micro_step(engine, 0)},
        "tokens": roll_out_cold(engine, 0)[1],
        "expected": expected,
    }


@pytest.mark.parametrize("stage", [0, 3])
def test_ctrl_c_before_any_bytecode_leaves_a_trainable_engine(ranks, stage):
    (result,) = ranks(1).run(interrupt_everywhere, stage)
    assert result["moments"] >= 200
    assert result["spoiled"] == []
    assert result["finished"] == []
    assert len(result["losses"]) == 1
    assert result["tokens"] == result["expected"] is not None


# At any time.


def press_after(seconds: float, act: Any) -> str:
    """Act, with a Ctrl-C coming in the middle of it; what became of it."""
    signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        try:
            if seconds:
                signal.setitimer(signal.ITIMER_REAL, seconds)
            act()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:
        return type(error).__name__
    return "nothing"


def interrupt_at_random(stage: int, call: str, moments: int) -> dict[str, Any]:
    """The last rank is interrupted at random moments; each time both look at what is left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = HybridConfig(tp_gather_partition_size=1)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    overrides = {"rope_parameters": rope} if call == "hf loop" else {}
    engine = hybrid_engine(
        stage, config=config, num_hidden_layers=2, lr=0.0, attention_dropout=0.0, **overrides
    )
    ids = torch.tensor([PROMPTS[0]])
    act = {
        "rollout": lambda: engine.rollout(PROMPTS, PARAMS),
        "hf loop": lambda: engine.rollout(PROMPTS, PARAMS),
        "generate": lambda: engine.generate(ids, max_new_tokens=3, do_sample=False),
        "beams": lambda: engine.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False),
    }[call]
    expected = hf_greedy(plain_copy(engine), PROMPTS, 3)
    is_pressed = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    losses = {micro_step(engine, 0)}
    act()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    typical_s = sorted(times)[2]
    generator = random.Random(stage)
    outcomes, spoiled, wrong = [], [], 0
    for moment in range(moments):
        if moment % 4 == 0:
            forget(engine)
        before = snapshot(engine)
        seconds = generator.uniform(1e-5, 1.2 * typical_s)
        outcomes.append(press_after(seconds if is_pressed else 0.0, act))
        spoiled += left_over(engine, before)
        if moment % 5 == 0:
            losses.add(micro_step(engine, 0))
        if moment % 2 == 0:
            wrong += tokens(engine.rollout(PROMPTS, GREEDY)) != expected
    return {"outcomes": outcomes, "spoiled": spoiled, "wrong": wrong, "losses": losses}


@pytest.mark.parametrize(
    ("world_size", "stage", "call"),
    [
        (1, 0, "rollout"),
        (1, 3, "rollout"),
        (2, 3, "rollout"),
        (2, 3, "generate"),
        (1, 3, "beams"),
        (1, 3, "hf loop"),
    ],
)
def test_ctrl_c_at_any_time_leaves_a_trainable_engine(ranks, world_size, stage, call):
    *others, pressed = ranks(world_size).run(interrupt_at_random, stage, call, 200, timeout_s=120.0)
    for result in (*others, pressed):
        assert result["spoiled"] == []
        assert result["wrong"] == 0
        assert len(result["losses"]) == 1
    assert set(pressed["outcomes"]) <= {"KeyboardInterrupt", "nothing"}
    assert pressed["outcomes"].count("KeyboardInterrupt") >= 100
    for result in others:
        for outcome, cause in zip(result["outcomes"], pressed["outcomes"], strict=True):
            # Pressed after the last meeting, it is that rank's alone.
            assert outcome in ("RankFailureError", "nothing")
            assert outcome == "nothing" or cause == "KeyboardInterrupt"
        assert result["outcomes"].count("RankFailureError") >= 50


# What is held.


def test_a_ctrl_c_is_held_delivered_and_let_through():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = []
    with pytest.raises(KeyboardInterrupt), InterruptsHeld():
        signal.raise_signal(signal.SIGINT)
        seen.append("held to the end")
    with InterruptsHeld() as interrupts:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.deliver()
        interrupts.deliver()
        with pytest.raises(KeyboardInterrupt):
            interrupts.let_through(lambda: signal.raise_signal(signal.SIGINT))
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.let_through(lambda: seen.append("not reached"))
        assert interrupts.let_through(lambda: 5) == 5
        seen.append("over")
    assert seen == ["held to the end", "over"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_does_not_raise_hears_of_every_ctrl_c():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with InterruptsHeld() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert heard == []

            def press_twice() -> None:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

            interrupts.let_through(press_twice)
            assert len(heard) == 3
            signal.raise_signal(signal.SIGINT)
            assert len(heard) == 3
        assert len(heard) == 4
    finally:
        signal.signal(signal.SIGINT, before)
