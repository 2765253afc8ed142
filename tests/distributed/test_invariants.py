"""What must hold around every rollout, on real ZeRO engines of one and two ranks."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    hf_greedy,
    hybrid_engine,
    micro_step,
    plain_copy,
    plain_engine,
    ragged_prompts,
    tokens,
)
from training_state import differences, snapshot

import tritonhybrid
from tritonhybrid import CacheExhaustedError, NonFiniteLogitsError, SamplingParams
from tritonhybrid.runner import Runner

GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=8, temperature=0.8, top_p=0.9, n=2)

both_world_sizes = pytest.mark.parametrize("world_size", [1, 2])
every_stage = pytest.mark.parametrize("stage", [0, 1, 2, 3])
stages_0_and_3 = pytest.mark.parametrize("stage", [0, 3])


def state_of(engine: Any) -> Any:
    return engine.__dict__["_tritonhybrid"]


# After a step.


def tokens_around_a_step(stage: int) -> list[tuple[list[list[int]], list[list[int]]]]:
    engine = hybrid_engine(stage, lr=0.1)
    prompts = ragged_prompts(4)
    pairs = []
    for index in range(3):
        pairs.append((tokens(engine.rollout(prompts, GREEDY)), hf_greedy(plain_copy(engine), prompts, 8)))
        micro_step(engine, index)
    return pairs


@both_world_sizes
@stages_0_and_3
def test_after_step_the_next_rollout_uses_the_new_weights(ranks, stage, world_size):
    for pairs in ranks(world_size).run(tokens_around_a_step, stage):
        for ours, hf in pairs:
            assert ours == hf
        assert pairs[0][0] != pairs[1][0] != pairs[2][0]


# Training is not touched.


def six_losses(stage: int, between: str) -> tuple[list[float], list[str]]:
    """Losses of six steps, with calls of ours between each or none; and what they changed."""
    engine = plain_engine(stage)
    if between != "nothing":
        tritonhybrid.wrap(engine)
    prompts = ragged_prompts(3)
    losses, changed = [], []
    for index in range(6):
        losses.append(micro_step(engine, index))
        if between == "nothing":
            continue
        before = snapshot(engine)
        engine.rollout(prompts, SAMPLED)
        engine.rollout(prompts[:index], GREEDY)
        engine.generate(torch.tensor([prompts[0]]), max_new_tokens=3, do_sample=False)
        changed += differences(before, snapshot(engine))
        if between == "rollouts in eval mode":
            engine.eval()
            engine.rollout(prompts, SAMPLED)
            engine.train()
    return losses, changed


@both_world_sizes
@every_stage
def test_losses_are_bit_equal_with_and_without_rollouts(ranks, stage, world_size):
    pool = ranks(world_size)
    plain = pool.run(six_losses, stage, "nothing")
    for between in ("rollouts in training mode", "rollouts in eval mode"):
        for (expected, _), (losses, changed) in zip(
            plain, pool.run(six_losses, stage, between), strict=True
        ):
            assert losses == expected
            assert changed == []


# Failures.


def fail_at(engine: Any, op: str, call: int, act: Callable[[], None]) -> Callable[[], None]:
    """Make an operation act up at its ``call``-th call from now; returns the undoing."""
    generation = state_of(engine).generation
    ops = generation.ops()
    original = getattr(ops, op)
    count = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            act()
        return original(*args, **kwargs)

    object.__setattr__(ops, op, failing)
    return lambda: object.__setattr__(ops, op, original)


def raise_error() -> None:
    raise ZeroDivisionError("on purpose")


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def losses_around_failures(stage: int, kind: str) -> dict[str, Any]:
    """Train with a call that fails between each step: in the probe, a prefill, a decode, ..."""
    act, error = {
        "error": (raise_error, ZeroDivisionError),
        "ctrl_c": (press_ctrl_c, KeyboardInterrupt),
    }[kind]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = plain_engine(stage)
    tritonhybrid.wrap(engine)
    prompts = ragged_prompts(3)
    sites = [
        ("add_rms_norm", 1),
        ("paged_attention_decode", 1),
        ("attention_varlen", 2),
        ("paged_attention_decode", 8),
        ("sample_logits", 4),
        ("linear", 30),
    ]
    losses, changed, raised, used = [], [], [], []
    for index, (op, call) in enumerate(sites):
        losses.append(micro_step(engine, index))
        before = snapshot(engine)
        restore = fail_at(engine, op, call, act)
        try:
            engine.rollout(prompts, SAMPLED)
        except error:
            raised.append(op)
        finally:
            restore()
        changed += differences(before, snapshot(engine))
        blocks = state_of(engine).generation.blocks
        if blocks is not None:
            blocks.check_integrity([])
            used.append(blocks.num_used)
    return {
        "losses": losses,
        "changed": changed,
        "raised": raised,
        "expected": [op for op, _ in sites],
        "used": used,
        "tokens": tokens(engine.rollout(prompts, GREEDY)),
        "hf_tokens": hf_greedy(plain_copy(engine), prompts, 8),
    }


def check_failures(ranks: Any, stage: int, world_size: int, kind: str) -> None:
    pool = ranks(world_size)
    plain = pool.run(six_losses, stage, "nothing")
    for (expected, _), result in zip(
        plain, pool.run(losses_around_failures, stage, kind), strict=True
    ):
        assert result["raised"] == result["expected"]
        assert result["changed"] == []
        assert result["losses"] == expected
        assert set(result["used"]) == {0}
        assert result["tokens"] == result["hf_tokens"]


@both_world_sizes
@every_stage
def test_an_exception_midway_leaves_a_trainable_engine(ranks, stage, world_size):
    check_failures(ranks, stage, world_size, "error")


@both_world_sizes
@stages_0_and_3
def test_ctrl_c_midway_leaves_a_trainable_engine(ranks, stage, world_size):
    check_failures(ranks, stage, world_size, "ctrl_c")
