"""Generation called from the places in a training loop where trainers call it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import pytest
import torch
from models import forward, hf_greedy, micro_step, plain_copy, plain_engine, ragged_prompts, tokens
from training_state import differences, snapshot

import tritonhybrid
from tritonhybrid import SamplingParams

GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=6, n=2)
PROMPTS = ragged_prompts(3)

both_world_sizes = pytest.mark.parametrize("world_size", [1, 2])
# With 100,000, DeepSpeed's default, all of a tiny model stays whole; with 0 none of it does.
persistences = pytest.mark.parametrize("persistence", [0, 100_000])


@contextmanager
def gathered_as_trl_does(engine: Any, *, hooks_removed: bool) -> Iterator[None]:
    """TRL's ``unwrap_model_for_generation``: all parameters whole, DeepSpeed's hooks off."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        offload = engine.optimizer.parameter_offload
        if hooks_removed:
            for parameter in offload.module.parameters():
                parameter.ds_active_sub_modules.clear()
            for hook in itertools.chain(offload.forward_hooks, offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
        yield
        if hooks_removed:
            offload._register_deepspeed_module(offload.module)


def generate_within_a_foreign_gather(
    hooks_removed: bool, persistence: int, with_us: bool
) -> dict[str, Any]:
    """Four steps with generation inside someone else's GatheredParameters between each."""
    engine = plain_engine(3, persistence=persistence)
    if with_us:
        tritonhybrid.wrap(engine)
    ids = torch.tensor([PROMPTS[1][:4]])
    result: dict[str, Any] = {"losses": [], "changed": [], "pairs": [], "strategies": []}
    for index in range(4):
        result["losses"].append(micro_step(engine, index))
        with gathered_as_trl_does(engine, hooks_removed=hooks_removed):
            if not with_us:
                continue
            before = snapshot(engine)
            out = engine.rollout(PROMPTS, GREEDY)
            generated = engine.module.generate(ids, max_new_tokens=6, do_sample=False)
            result["strategies"].append(out.stats.strategy)
            result["changed"] += differences(before, snapshot(engine))
        copy = plain_copy(engine)
        result["pairs"].append((tokens(out), hf_greedy(copy, PROMPTS, 6)))
        result["pairs"].append(([generated[0, 4:].tolist()], hf_greedy(copy, ids.tolist(), 6)))
    return result


@both_world_sizes
@persistences
@pytest.mark.parametrize("hooks_removed", [True, False])
def test_generate_inside_a_foreign_gather(ranks, hooks_removed, persistence, world_size):
    pool = ranks(world_size)
    plain = pool.run(generate_within_a_foreign_gather, hooks_removed, persistence, False)
    ours = pool.run(generate_within_a_foreign_gather, hooks_removed, persistence, True)
    for expected, result in zip(plain, ours, strict=True):
        assert result["losses"] == expected["losses"]
        assert result["changed"] == []
        for tokens_, hf in result["pairs"]:
            assert tokens_ == hf
        # Where all is persistent nothing was gathered, and there is nothing foreign about it.
        assert set(result["strategies"]) == {"foreign" if persistence == 0 else "pinned"}


def partly_gathered() -> dict[str, Any]:
    """Someone holds a few parameters whole; we gather the others."""
    engine = tritonhybrid.wrap(plain_engine(3))
    held = [engine.module.lm_head.weight, engine.module.model.layers[1].mlp.up_proj.weight]
    with deepspeed.zero.GatheredParameters(held):
        before = snapshot(engine)
        out = engine.rollout(PROMPTS, GREEDY)
        changed = differences(before, snapshot(engine))
    return {
        "changed": changed,
        "tokens": tokens(out),
        "hf_tokens": hf_greedy(plain_copy(engine), PROMPTS, 6),
        "strategy": out.stats.strategy,
    }


@both_world_sizes
def test_rollout_while_someone_holds_some_parameters_whole(ranks, world_size):
    for result in ranks(world_size).run(partly_gathered):
        assert result["changed"] == []
        assert result["tokens"] == result["hf_tokens"]
        assert result["strategy"] == "pinned"


def enable_checkpointing(module: Any) -> None:
    # transformers 5.23 renamed it and warns at the old name.
    getattr(module, "activation_checkpointing_enable", module.gradient_checkpointing_enable)()


def call_in_training_mode(stage: int, with_us: bool) -> dict[str, Any]:
    """Gradient checkpointing on, one submodule in eval mode on purpose, nobody calls ``eval()``."""
    engine = plain_engine(stage)
    enable_checkpointing(engine.module)
    engine.train()
    engine.module.model.layers[1].mlp.eval()
    if with_us:
        tritonhybrid.wrap(engine)
    ids = torch.tensor([PROMPTS[1][:4]])
    result: dict[str, Any] = {"losses": [], "changed": [], "pairs": [], "notes": []}
    for index in range(3):
        result["losses"].append(micro_step(engine, index))
        if not with_us:
            continue
        before = snapshot(engine)
        generated = engine.generate(ids, max_new_tokens=6, do_sample=False)
        result["notes"].append(engine.stats.notes)
        out = engine.rollout(PROMPTS, GREEDY)
        result["changed"] += differences(before, snapshot(engine))
        copy = plain_copy(engine)
        result["pairs"].append((tokens(out), hf_greedy(copy, PROMPTS, 6)))
        result["pairs"].append(([generated[0, 4:].tolist()], hf_greedy(copy, ids.tolist(), 6)))
    return result


@both_world_sizes
@pytest.mark.parametrize("stage", [0, 3])
def test_generate_in_training_mode_with_gradient_checkpointing(ranks, stage, world_size):
    pool = ranks(world_size)
    plain = pool.run(call_in_training_mode, stage, False)
    for expected, result in zip(plain, pool.run(call_in_training_mode, stage, True), strict=True):
        assert result["losses"] == expected["losses"]
        assert result["changed"] == []
        for tokens_, hf in result["pairs"]:
            assert tokens_ == hf
        for notes in result["notes"]:
            assert any("training mode" in note for note in notes)


def calls_between_forward_and_backward(
    stage: int, persistence: int, with_us: bool
) -> dict[str, Any]:
    """Two micro-steps a step, and a call of ours at every point between them."""
    engine = plain_engine(stage, accumulation=2, persistence=persistence)
    if with_us:
        tritonhybrid.wrap(engine)
    result: dict[str, Any] = {"losses": [], "changed": [], "tokens": []}

    def call() -> None:
        if not with_us:
            return
        before = snapshot(engine)
        engine.rollout(PROMPTS, SAMPLED)
        result["tokens"].append(tokens(engine.rollout(PROMPTS, GREEDY)))
        result["changed"] += differences(before, snapshot(engine))

    for index in range(6):
        call()
        loss = forward(engine, index)
        call()
        engine.backward(loss)
        call()
        engine.step()
        result["losses"].append(loss.item())
    with torch.no_grad():
        forward(engine, 7)
    call()
    forward(engine, 8)
    call()
    result["hf_tokens"] = hf_greedy(plain_copy(engine), PROMPTS, 6)
    return result


@both_world_sizes
@pytest.mark.parametrize(("stage", "persistence"), [(0, 0), (1, 0), (2, 0), (3, 0), (3, 100_000)])
def test_calls_between_forward_backward_and_step_leave_losses_bit_equal(
    ranks, stage, persistence, world_size
):
    pool = ranks(world_size)
    plain = pool.run(calls_between_forward_and_backward, stage, persistence, False)
    ours = pool.run(calls_between_forward_and_backward, stage, persistence, True)
    for expected, result in zip(plain, ours, strict=True):
        assert result["losses"] == expected["losses"]
        assert result["changed"] == []
        assert len(result["tokens"]) == 20
        # The weights stay until the second micro-step's step.
        assert result["tokens"][0] == result["tokens"][5] != result["tokens"][6]
        assert result["tokens"][-1] == result["tokens"][-2] == result["hf_tokens"]
