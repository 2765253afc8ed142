"""What surrounds a call: inference mode, autocast, a forward before it, hooks that fail once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import hf_greedy, hybrid_engine, micro_step, plain_copy, tokens

import tritonhybrid
from tritonhybrid import EngineStateError, SamplingParams
from tritonhybrid.config import HybridConfig, resolve

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)


@pytest.fixture(params=[0, 3])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    zero = {"stage": request.param, "stage3_param_persistence_threshold": 0}
    engine = hybrid_engine(request.param, json={"zero_optimization": zero})
    yield engine
    tritonhybrid.unwrap(engine)
    engine.destroy()


def hf(engine: Any) -> list[list[int]]:
    return hf_greedy(plain_copy(engine), PROMPTS, GREEDY.max_new_tokens)


def test_calls_in_and_after_inference_mode_give_hfs_tokens(engine: Any):
    expected = hf(engine)
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        assert tokens(engine.rollout(PROMPTS, GREEDY)) == expected
        engine.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert tokens(engine.rollout(PROMPTS, GREEDY)) == expected
    out = engine.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out[0, 3:].tolist() == expected[0]


def test_autocast_is_off_inside_a_call_and_said(engine: Any):
    engine.eval()
    expected = hf(engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = engine.rollout(PROMPTS, GREEDY)
    assert tokens(out) == expected
    assert any("autocast to torch.bfloat16 is off" in note for note in out.stats.notes)
    plain = engine.rollout(PROMPTS, GREEDY)
    assert tokens(plain) == expected
    assert plain.stats.notes == [] and plain.stats.path == out.stats.path == "fused"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_autocast_of_an_engines_config_is_off_inside_a_call_and_said(stage: int):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    json = {"zero_optimization": zero, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    engine = hybrid_engine(stage, json=json)
    try:
        seen: list[torch.dtype] = []
        head = engine.module.lm_head
        handle = head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        micro_step(engine, 0)
        assert seen == [torch.bfloat16]
        seen.clear()
        out = engine.rollout(PROMPTS, GREEDY)
        ids = torch.tensor([PROMPTS[0]])
        generated = engine.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert set(seen) == {torch.float32}
        expected = hf(engine)
        assert tokens(out) == expected
        assert generated[0, 3:].tolist() == expected[0]
        assert "autocast to torch.bfloat16 is off inside the call" in "".join(out.stats.notes)
        assert "computes in the weights' torch.float32" in "".join(out.stats.notes)
        assert out.stats.path == "fused"
        # The training forward is DeepSpeed's as before.
        seen.clear()
        micro_step(engine, 1)
        assert seen == [torch.bfloat16]
        handle.remove()
    finally:
        tritonhybrid.unwrap(engine)
        engine.destroy()


def test_a_forward_after_a_training_step_is_no_gather_of_the_callers(engine: Any):
    micro_step(engine, 0)
    engine.eval()
    with torch.no_grad():
        engine(input_ids=torch.tensor([PROMPTS[0]]))
    out = engine.rollout(PROMPTS, GREEDY)
    stage = engine.zero_optimization_stage()
    assert out.stats.strategy == ("pinned" if stage == 3 else "resident")
    assert tokens(out) == hf(engine)


def test_a_hook_that_fails_once_in_the_probe_costs_one_call_its_speed(engine: Any):
    calls: list[int] = []

    def fails_once(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("busy")

    handle = engine.module.model.layers[0].register_forward_hook(fails_once)
    expected = hf(engine)
    calls.clear()
    outs = [engine.rollout(PROMPTS, GREEDY) for _ in range(2)]
    handle.remove()
    assert [tokens(out) for out in outs] == [expected, expected]
    assert [out.stats.path for out in outs] == ["hf", "generic"]
    assert any("busy" in note for note in outs[0].stats.notes)


def test_a_rollout_from_within_a_rollout_is_refused_in_the_probe_too(engine: Any):
    def nested(*args: Any) -> None:
        engine.rollout(PROMPTS, GREEDY)

    handle = engine.module.model.layers[0].register_forward_hook(nested)
    with pytest.raises(EngineStateError, match="don't nest"):
        engine.rollout(PROMPTS, GREEDY)
    handle.remove()
    assert tokens(engine.rollout(PROMPTS, GREEDY)) == hf(engine)


def test_a_hook_on_any_module_of_a_layer_runs(engine: Any):
    calls: list[int] = []
    act = engine.module.model.layers[1].mlp.act_fn
    handle = act.register_forward_hook(lambda *args: calls.append(1))
    engine.rollout(PROMPTS, GREEDY)
    calls.clear()
    out = engine.rollout(PROMPTS, GREEDY)
    handle.remove()
    # Prefill and five decode steps, in the one layer that is watched.
    assert len(calls) == 6
    assert any(path.startswith("generic: mlp.act_fn has a hook") for path in out.stats.layer_paths)


def test_a_hybrid_config_lies_over_the_engines_json():
    settings = resolve(HybridConfig(block_size=16), {"max_out_tokens": 8, "enabled": False})
    assert (settings.block_size, settings.max_out_tokens) == (16, 8)
    with pytest.raises(tritonhybrid.ConfigError, match="inference_tp_size"):
        resolve(HybridConfig(block_size=16), {"inference_tp_size": 4})
