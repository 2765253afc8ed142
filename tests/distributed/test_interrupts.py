"""Ctrl-C at hundreds of moments of a rollout, from the first check to the last restoration."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from models import hybrid_engine, micro_step, ragged_prompts, tokens
from training_state import differences, snapshot

import tritonhybrid
from tritonhybrid import SamplingParams

PACKAGE = str(Path(tritonhybrid.__file__).parent)
PROMPTS = ragged_prompts(2)
PARAMS = SamplingParams(max_new_tokens=3, temperature=0.8, top_p=0.9, n=2, seed=3)

# The moment before one of these has run its first line is the one that Python leaves open.
DOORS = {"__exit__", "__enter__", "undo"}


def roll_out_cold(engine: Any, press_at: int) -> tuple[int, Any]:
    """Roll out with nothing kept from before; Ctrl-C when our package makes its n-th call.

    Returns:
        Calls that our package made, and the tokens, or None if the call was interrupted.
    """
    generation = engine.__dict__["_tritonhybrid"].generation
    generation._verdicts.clear()
    generation.release()
    count = 0
    result = None

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        code = frame.f_code
        # Nobody hears what is raised where Python closes a generator.
        if event != "call" or code.co_name in DOORS or code.co_name == "<genexpr>":
            return
        if code.co_filename.startswith(PACKAGE):
            count += 1
            if count == press_at:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(watch)
    try:
        result = tokens(engine.rollout(PROMPTS, PARAMS))
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return count, result


def interrupt_everywhere(stage: int) -> dict[str, Any]:
    """Interrupt one rollout after another, each a few calls later; train once in a while."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = hybrid_engine(stage, num_hidden_layers=1, lr=0.0, attention_dropout=0.0)
    loss = micro_step(engine, 0)
    calls, expected = roll_out_cold(engine, 0)
    spoiled, losses, finished = [], [], []
    moments = list(range(1, calls + 1, max(1, calls // 150)))
    for moment in moments:
        before = snapshot(engine)
        _, result = roll_out_cold(engine, moment)
        changed = differences(before, snapshot(engine))
        if changed:
            spoiled.append((moment, changed[:3]))
            break
        if result is not None:
            finished.append(moment)
        if moment % 20 == 0:
            losses.append(micro_step(engine, 0))
    return {
        "moments": len(moments),
        "spoiled": spoiled,
        "finished": finished,
        "losses": {loss, *losses, micro_step(engine, 0)},
        "handler": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "tokens": roll_out_cold(engine, 0)[1],
        "expected": expected,
    }


@pytest.mark.parametrize("stage", [0, 3])
def test_ctrl_c_at_any_moment_leaves_a_trainable_engine(ranks, stage):
    (result,) = ranks(1).run(interrupt_everywhere, stage)
    assert result["moments"] >= 150
    assert result["spoiled"] == []
    assert result["finished"] == []
    assert len(result["losses"]) == 1
    assert result["handler"]
    assert result["tokens"] == result["expected"] is not None
