"""What must hold around every rollout, on real ZeRO engines of one and two ranks."""

from __future__ import annotations

import signal
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
from tritonhybrid import CacheExhaustedError, SamplingParams

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
        pairs.append(
            (tokens(engine.rollout(prompts, GREEDY)), hf_greedy(plain_copy(engine), prompts, 8))
        )
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
        # What was half written in the pages is given up with them.
        generation = state_of(engine).generation
        used.append((generation.cache, generation.blocks))
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
        assert result["used"] == [(None, None)] * len(result["expected"])
        assert result["tokens"] == result["hf_tokens"]


@both_world_sizes
@every_stage
def test_an_exception_midway_leaves_a_trainable_engine(ranks, stage, world_size):
    check_failures(ranks, stage, world_size, "error")


@both_world_sizes
@stages_0_and_3
def test_ctrl_c_midway_leaves_a_trainable_engine(ranks, stage, world_size):
    check_failures(ranks, stage, world_size, "ctrl_c")


# Pages.


def pages_after_calls(stage: int) -> list[tuple[str, int, int, int]]:
    """Pages in use, free and in total after calls that end in every way there is."""
    page = 2 * 2 * 16 * 4 * 4 * 3
    config = {"block_size": 4, "kv_cache_bytes": 14 * page, "max_num_seqs": 8}
    engine = hybrid_engine(stage, config=config)
    prompts = ragged_prompts(6)
    seen = []

    def note(how: str) -> None:
        blocks = state_of(engine).generation.blocks
        if blocks is None:
            # A failed call gives up its pages altogether, for what was half written in them.
            seen.append((how, 0, 0, 0))
            return
        blocks.check_integrity([])
        seen.append((how, blocks.num_used, blocks.num_free, blocks.num_blocks))

    engine.rollout(prompts[:2], GREEDY)
    note("length")
    engine.rollout(prompts, SamplingParams(max_new_tokens=16, n=3, seed=1))
    note("preempted" if engine.stats.preemptions else "not preempted")
    engine.rollout([[5, 6]], SamplingParams(max_new_tokens=8, eos_token_id=list(range(3, 101))))
    note("stop")
    engine.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    note("generate")
    restore = fail_at(engine, "paged_attention_decode", 5, raise_error)
    try:
        engine.rollout(prompts, SAMPLED)
    except ZeroDivisionError:
        note("error")
    restore()
    try:
        engine.rollout([prompts[0], [5] * 60], SAMPLED)
    except CacheExhaustedError:
        note("exhausted")
    return seen


@stages_0_and_3
def test_pages_are_all_returned_however_a_call_ends(ranks, stage):
    (seen,) = ranks(1).run(pages_after_calls, stage)
    assert [how for how, *_ in seen] == [
        "length",
        "preempted",
        "stop",
        "generate",
        "error",
        "exhausted",
    ]
    for how, used, free, total in seen:
        assert (how, used, free) == (how, 0, total)


# Greedy.


def greedy_of_every_shape(stage: int) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Greedy tokens under settings that cut the work differently, beside HF's."""
    page = 2 * 2 * 16 * 4 * 4 * 3
    engine = plain_engine(stage)
    copy = plain_copy(engine)
    prompts = [*ragged_prompts(6), [9], ragged_prompts(6)[2]]
    expected = hf_greedy(copy, prompts, 12)
    pairs = []
    for config in (
        {},
        {"block_size": 1},
        {"block_size": 4, "kv_cache_bytes": 12 * page},
        {"max_num_seqs": 2, "max_num_batched_tokens": 4},
    ):
        tritonhybrid.wrap(engine, config=config)
        params = SamplingParams(max_new_tokens=12, temperature=0.0)
        pairs.append((tokens(engine.rollout(prompts, params)), expected))
        tritonhybrid.unwrap(engine)
    tritonhybrid.wrap(engine)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    for inputs in ({"input_ids": ids}, {"inputs": ids}):
        ours = engine.generate(**inputs, attention_mask=mask, max_new_tokens=12, do_sample=False)
        hf = copy.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        pairs.append((ours.tolist(), hf.tolist()))
    eos = expected[0][3]
    stop = SamplingParams(max_new_tokens=12, temperature=0.0, eos_token_id=eos)
    pairs.append((tokens(engine.rollout(prompts, stop)), hf_greedy(copy, prompts, 12, eos)))
    return pairs


@both_world_sizes
@stages_0_and_3
def test_greedy_equals_hf(ranks, stage, world_size):
    for pairs in ranks(world_size).run(greedy_of_every_shape, stage):
        assert len(pairs) == 7
        for ours, hf in pairs:
            assert ours == hf
        # The end token did cut something.
        assert min(map(len, pairs[-1][0])) < 12


# Decisions.


def decisions(stage: int) -> dict[str, Any]:
    """Stats of calls that take each path, on one and the same engine."""
    prompts = [[5, 6, 7]]
    engine = hybrid_engine(stage)
    found = {"training": engine.rollout(prompts, GREEDY).stats}
    engine.eval()
    found["fused"] = engine.rollout(prompts, GREEDY).stats
    found["sampled"] = engine.rollout(prompts, SAMPLED).stats
    handle = engine.module.model.layers[1].register_forward_hook(lambda *args: None)
    found["hooked"] = engine.rollout(prompts, GREEDY).stats
    handle.remove()
    found["unhooked"] = engine.rollout(prompts, GREEDY).stats
    engine.generate(torch.tensor(prompts), max_new_tokens=2, num_beams=2, do_sample=False)
    found["beams"] = engine.stats
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = hybrid_engine(stage, rope_parameters=rope)
    dynamic.eval()
    found["dynamic"] = dynamic.rollout(prompts, GREEDY).stats
    return found


@stages_0_and_3
def test_decisions_are_visible_in_stats(ranks, stage):
    (found,) = ranks(1).run(decisions, stage)
    for stats in found.values():
        assert stats.backend == "torch"
        assert stats.strategy == ("pinned" if stage == 3 else "resident")
        assert (stats.gather_bytes > 0) == (stats.extra_weight_bytes > 0) == (stage == 3)
    for name in ("training", "fused", "sampled", "unhooked"):
        assert found[name].path == "fused"
        assert found[name].layer_paths == {"fused: LlamaDecoderLayer is described": 3}
    assert any("training mode" in note for note in found["training"].notes)
    assert found["fused"].notes == []
    assert found["fused"].sampler == "argmax"
    assert found["sampled"].sampler == "inverse_cdf"
    assert found["hooked"].path == "generic"
    assert sorted(found["hooked"].layer_paths.values()) == [1, 2]
    assert any("hook" in reason for reason in found["hooked"].layer_paths)
    assert found["beams"].path == "hf"
    assert any("num_beams" in note for note in found["beams"].notes)
    assert found["dynamic"].path == "hf"
    assert any("dynamic NTK" in note for note in found["dynamic"].notes)
    assert found["sampled"].prompt_tokens == 3
    assert found["sampled"].prefill_tokens == 3
    assert found["sampled"].completion_tokens == 16
    assert found["fused"].num_prefill_steps == 1
    assert found["fused"].num_decode_steps == 7
