"""Copies, pickles and checkpoints of a module whose engine is wrapped."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from models import (
    build_model,
    hf_greedy,
    hybrid_engine,
    micro_step,
    plain_copy,
    plain_engine,
    tokens,
)
from transformers import LlamaForCausalLM

import tritonhybrid
from tritonhybrid import SamplingParams

GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)
PROMPTS = [[5, 6, 7], [8, 9]]
IDS = torch.tensor([[5, 6, 7]])

stages_0_and_3 = pytest.mark.parametrize("stage", [0, 3])


def greedy(module: Any) -> list[int]:
    return module.generate(IDS, max_new_tokens=6, do_sample=False)[0, 3:].tolist()


@stages_0_and_3
def test_state_dict_keys_are_the_plain_models(stage):
    keys = list(build_model().state_dict())
    engine = hybrid_engine(stage)
    assert list(engine.module.state_dict()) == keys
    engine.rollout(PROMPTS, GREEDY)
    engine.generate(IDS, max_new_tokens=3, do_sample=False)
    assert list(engine.module.state_dict()) == keys
    assert [name for name, _ in engine.module.named_modules() if "triton" in name] == []


def test_a_deep_copy_generates_with_its_own_weights():
    engine = hybrid_engine(0, lr=0.1)
    engine.rollout(PROMPTS, GREEDY)
    reference = copy.deepcopy(engine.module).eval()
    was = greedy(reference)
    assert was == hf_greedy(plain_copy(engine), IDS.tolist(), 6)[0]
    served = engine.stats
    micro_step(engine, 0)
    now = greedy(engine.module)
    assert now == hf_greedy(plain_copy(engine), IDS.tolist(), 6)[0]
    assert engine.stats is not served
    served = engine.stats
    # The copy kept the old weights, runs HF's generate, and the engine hears nothing of it.
    assert greedy(reference) == was != now
    assert engine.stats is served


def test_a_deep_copy_is_an_engine_of_its_own_when_wrapped():
    engine = hybrid_engine(0)
    other = hybrid_engine(0, model=copy.deepcopy(engine.module), lr=0.1)
    assert "generate" in other.module.__dict__
    before = tokens(engine.rollout(PROMPTS, GREEDY))
    assert tokens(other.rollout(PROMPTS, GREEDY)) == before
    micro_step(other, 0)
    assert greedy(other.module) == hf_greedy(plain_copy(other), IDS.tolist(), 6)[0]
    assert greedy(engine.module) == before[0]
    tritonhybrid.unwrap(other)
    assert "generate" not in other.module.__dict__


def test_a_pickled_module_comes_back_with_huggingfaces_generate():
    engine = hybrid_engine(0)
    expected = tokens(engine.rollout(PROMPTS, GREEDY))[0]
    # DeepSpeed's hooks can't be pickled, wrapped or not.
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        for module in engine.module.modules():
            getattr(module, hooks).clear()
    loaded = pickle.loads(pickle.dumps(engine.module)).eval()
    assert greedy(loaded) == expected
    with torch.no_grad():
        loaded.lm_head.weight.neg_()
    assert greedy(loaded) != expected
    assert greedy(engine.module) == expected


@stages_0_and_3
def test_a_saved_model_loads_as_a_plain_one(stage, tmp_path):
    engine = hybrid_engine(stage)
    expected = tokens(engine.rollout(PROMPTS, GREEDY))
    if stage == 3:
        copied = plain_copy(engine)
        engine.module.save_pretrained(tmp_path, state_dict=copied.state_dict())
    else:
        engine.module.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert "generate" not in loaded.__dict__
    assert loaded.config.to_dict().get("_attn_implementation") in (None, "eager")
    assert hf_greedy(loaded.eval(), PROMPTS, 6) == expected


@stages_0_and_3
def test_a_checkpoint_of_the_engine_resumes_with_the_same_tokens_and_losses(stage, tmp_path):
    engine = hybrid_engine(stage, attention_dropout=0.0)
    micro_step(engine, 0)
    engine.rollout(PROMPTS, GREEDY)
    engine.save_checkpoint(str(tmp_path), tag="one")
    expected = tokens(engine.rollout(PROMPTS, GREEDY))
    loss = micro_step(engine, 1)
    resumed = hybrid_engine(stage, attention_dropout=0.0)
    resumed.rollout(PROMPTS, GREEDY)
    resumed.load_checkpoint(str(tmp_path), tag="one")
    assert tokens(resumed.rollout(PROMPTS, GREEDY)) == expected
    assert micro_step(resumed, 1) == loss


def test_torch_save_of_the_state_dict_holds_the_weights_alone():
    engine = hybrid_engine(0)
    engine.rollout(PROMPTS, GREEDY)
    file = io.BytesIO()
    torch.save(engine.module.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    plain = build_model()
    plain.load_state_dict(loaded)
    assert hf_greedy(plain.eval(), PROMPTS, 6) == tokens(engine.rollout(PROMPTS, GREEDY))


def test_get_peft_model_after_wrap_serves_the_adapters():
    from peft import LoraConfig, get_peft_model

    engine = hybrid_engine(0)
    base = tokens(engine.rollout(PROMPTS, GREEDY))
    copied = plain_copy(engine)
    torch.manual_seed(9)
    config = LoraConfig(
        target_modules=["q_proj", "down_proj"], r=4, lora_alpha=64, init_lora_weights=False
    )
    adapted = get_peft_model(engine.module, config)
    torch.manual_seed(9)
    expected = hf_greedy(get_peft_model(copied, config).eval(), PROMPTS, 6)
    assert expected != base
    assert tokens(engine.rollout(PROMPTS, GREEDY)) == expected
    assert greedy(adapted) == expected[0]
    assert engine.stats.path == "fused"
    with adapted.disable_adapter():
        assert tokens(engine.rollout(PROMPTS, GREEDY)) == base
    assert tokens(engine.rollout(PROMPTS, GREEDY)) == expected


def test_nothing_of_ours_keeps_a_dropped_engine_alive():
    engine = hybrid_engine(0)
    engine.rollout(PROMPTS, GREEDY)
    module = engine.module
    seen = weakref.ref(engine.__dict__["_tritonhybrid"].generation)
    tritonhybrid.unwrap(engine)
    gc.collect()
    assert seen() is None
    assert greedy(module.eval()) == hf_greedy(plain_copy(engine), IDS.tolist(), 6)[0]


def test_two_engines_in_one_process_serve_their_own_modules():
    one = hybrid_engine(0)
    two = hybrid_engine(3, model=build_model(seed=1))
    plain = plain_engine(0, model=build_model(seed=2))
    for engine in (one, two):
        assert greedy(engine.module) == hf_greedy(plain_copy(engine), IDS.tolist(), 6)[0]
    assert "generate" not in plain.module.__dict__
    assert greedy(one.module) != greedy(two.module)
