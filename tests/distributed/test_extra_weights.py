"""Bytes that a rollout holds beside the training copy, measured inside its decode steps."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from models import hybrid_engine

from tritonhybrid import SamplingParams
from tritonhybrid.runner import Runner


def state_of(engine: Any) -> Any:
    return engine.__dict__["_tritonhybrid"]


def tensor_bytes(known: set[int]) -> tuple[int, set[int]]:
    """Bytes of all storages that live now and are not known, each once."""
    seen: dict[int, int] = {}
    for thing in gc.get_objects():
        # Not isinstance: it asks lazy proxies for their class, and deprecated ones warn.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    new = {pointer: size for pointer, size in seen.items() if pointer not in known}
    return sum(new.values()), set(seen)


def weight_bytes_in_a_step(stage: int) -> tuple[int, int, int, int]:
    """Bytes that came alive with a rollout, the cache left out, seen inside its decode steps."""
    engine = hybrid_engine(stage, hidden_size=256, intermediate_size=512, vocab_size=1024)
    params = SamplingParams(max_new_tokens=4, temperature=0.0)
    gc.collect()
    _, known = tensor_bytes(set())
    original = Runner.execute
    most = 0

    def execute(self: Runner, step: Any) -> Any:
        nonlocal most
        result = original(self, step)
        cache = state_of(engine).generation.cache
        pages = {t.untyped_storage().data_ptr() for t in (*cache.keys, *cache.values)}
        most = max(most, tensor_bytes(known | pages)[0])
        return result

    Runner.execute = execute
    try:
        engine.rollout([[5, 6, 7], [8, 9]], params)
    finally:
        Runner.execute = original
    model = sum(p.numel() * p.element_size() for p in engine.module.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) * 4 for p in engine.module.parameters())
    del execute
    return most, model, whole, engine.stats.extra_weight_bytes


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_0_to_2_allocate_no_extra_weights(ranks, stage):
    ((most, model, _, reported),) = ranks(1).run(weight_bytes_in_a_step, stage)
    assert model > 8_000_000
    assert most <= 0.01 * model
    assert reported == 0


def test_the_measure_of_extra_weights_sees_the_zero_3_arena(ranks):
    ((most, _, whole, reported),) = ranks(1).run(weight_bytes_in_a_step, 3)
    assert whole <= most
    assert whole <= reported <= 1.01 * whole
