"""The methods of DeepSpeed's own hybrid engine, with their meaning here."""

from __future__ import annotations

import inspect
import logging
import re
import time
from typing import Any

import pytest
import torch
from models import hf_greedy, hybrid_engine, micro_step, plain_copy, plain_engine, tokens
from training_state import differences, snapshot

import tritonhybrid
from tritonhybrid import ConfigError, HybridEngine, SamplingParams
from tritonhybrid.containers.description import LayerDescription, describe_from_structure

GREEDY = SamplingParams(max_new_tokens=5, temperature=0.0)
PROMPTS = [[5, 6, 7], [8, 9]]
IDS = torch.tensor([[5, 6, 7]])

SIGNATURES = {
    "eval": "(self)",
    "train": "(self, mode=True)",
    "step": "(self, lr_kwargs=None)",
    "generate": "(self, *inputs, **kwargs)",
    "fuse_lora_weight": "(self)",
    "unfuse_lora_weight": "(self)",
    "unfuse_lora_weight_non_pinned": "(self)",
    "retake_inference_cache": "(self)",
    "release_inference_cache": "(self)",
    "populate_all_inference_policies": "(self)",
    "new_inference_container": "(self, orig_layer, policy_cls, layer_id)",
    "create_inference_containers": "(self, module, layer_id=0)",
    "create_inference_module": "(self)",
    "convert_to_linear_transposed": "(self, model)",
    "_zero3_forward": "(self, layer_id)",
    "prepare_shared_prefill": "(self, source_batch_size, repeats, prompt_length)",
    "repeat_shared_prefill_cache": "(self, source_batch_size, repeats)",
}

stages_0_and_3 = pytest.mark.parametrize("stage", [0, 3])


def state_of(engine: Any) -> Any:
    return engine.__dict__["_tritonhybrid"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_method_of_deepspeeds_hybrid_engine_is_there_and_documented(name):
    method = getattr(HybridEngine, name)
    signature = inspect.signature(method)
    bare = signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
        return_annotation=signature.empty,
    )
    assert str(bare) == SIGNATURES[name]
    assert len(method.__doc__) > 20


def test_eval_train_and_step_return_what_the_base_engine_returns():
    engine = plain_engine(0)

    class Answering(type(engine)):
        def eval(self):
            super().eval()
            return "from eval"

        def train(self, mode=True):
            super().train(mode)
            return ("from train", mode)

        def step(self, lr_kwargs=None):
            super().step(lr_kwargs)
            return ("from step", lr_kwargs)

    engine.__class__ = Answering
    tritonhybrid.wrap(engine)
    assert engine.eval() == "from eval"
    assert not engine.module.training
    assert engine.train() == ("from train", True)
    assert engine.module.training
    assert engine.train(False) == ("from train", False)
    assert not engine.module.training
    engine.train(True)
    loss = engine(input_ids=IDS, labels=IDS).loss
    engine.backward(loss)
    assert engine.step() == ("from step", None)


@stages_0_and_3
def test_eval_reports_the_cycle_that_it_ends(stage, caplog):
    engine = hybrid_engine(stage)
    caplog.set_level(logging.INFO, logger="tritonhybrid")
    start = time.perf_counter()
    engine.eval()
    assert engine.latency_report is None
    rollouts = [engine.rollout(PROMPTS, GREEDY).stats for _ in range(2)]
    before_training = time.perf_counter()
    engine.train()
    time.sleep(0.05)
    micro_step(engine, 0)
    training_s = time.perf_counter() - before_training
    time.sleep(0.05)
    engine.eval()
    seconds = time.perf_counter() - start
    report = engine.latency_report
    assert training_s + 0.05 <= report.e2e_s <= seconds
    assert report.gather_s == pytest.approx(sum(stats.gather_s for stats in rollouts))
    assert (report.gather_s > 0) == (stage == 3)
    spent = sum(stats.total_s for stats in rollouts)
    assert report.generate_s == pytest.approx(spent - report.gather_s)
    assert 0.05 <= report.training_s <= training_s
    assert report.others_s >= 0.05
    assert report.samples == 2
    whole = report.gather_s + report.generate_s + report.training_s + report.others_s
    assert whole == pytest.approx(report.e2e_s)
    line = caplog.messages[-1]
    figure = r"\d+\.\d\ds"
    share = r" \(-?\d+\.\d\d%\) "
    assert re.fullmatch(
        rf"\|E2E latency={figure} \|Gather latency={figure}{share}\|Generate time={figure}{share}"
        rf"\|Training time={figure}{share}\|Others={figure}{share}"
        r"\|CurSamplesPerSec=\d+\.\d\d \|AvgSamplesPerSec=\d+\.\d\d",
        line,
    ), line
    engine.eval()
    later = engine.latency_report
    assert later.gather_s == later.generate_s == later.training_s == 0
    assert later.mean_e2e_s == pytest.approx((report.e2e_s + later.e2e_s) / 2)


@stages_0_and_3
def test_releasing_the_cache_frees_it_and_the_next_call_makes_another(stage):
    engine = hybrid_engine(stage)
    expected = tokens(engine.rollout(PROMPTS, GREEDY))
    generation = state_of(engine).generation
    assert generation.cache is not None
    assert (generation.source.arena_bytes > 0) == (stage == 3)
    engine.release_inference_cache()
    assert generation.cache is None
    assert generation.source.arena_bytes == 0
    engine.retake_inference_cache()
    assert tokens(engine.rollout(PROMPTS, GREEDY)) == expected


@stages_0_and_3
def test_release_inference_cache_in_the_json_frees_it_after_each_call(stage):
    engine = tritonhybrid.wrap(
        plain_engine(stage, json={"hybrid_engine": {"release_inference_cache": True}})
    )
    out = engine.rollout(PROMPTS, GREEDY)
    assert out.stats.kv_bytes > 0
    generation = state_of(engine).generation
    assert generation.cache is None
    assert generation.source.arena_bytes == 0
    assert tokens(out) == hf_greedy(plain_copy(engine), PROMPTS, 5)


def test_the_json_names_deepspeeds_settings_and_wrap_overrides_them():
    json = {"hybrid_engine": {"enabled": False, "max_out_tokens": 9, "tp_gather_partition_size": 1}}
    engine = tritonhybrid.wrap(plain_engine(0, json=json), config={"max_out_tokens": 8})
    assert engine.hybrid_config.max_out_tokens == 8
    assert engine.hybrid_config.tp_gather_partition_size == 1
    with pytest.raises(ConfigError, match=r"max_out_tokens: expected at most 8 tokens, got 3 \+ 6"):
        engine.rollout([[5, 6, 7]], SamplingParams(max_new_tokens=6))


def test_deepspeeds_default_of_512_tokens_limits_nothing():
    engine = hybrid_engine(0, max_position_embeddings=1024, num_hidden_layers=1)
    assert engine._config.hybrid_engine.max_out_tokens == 512
    out = engine.rollout([[5] * 520], SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert len(out.completions[0].token_ids) == 2


def test_layers_per_gather_changes_no_token():
    expected = None
    for layers in (1, 2, 8):
        engine = hybrid_engine(3, config={"tp_gather_partition_size": layers})
        found = tokens(engine.rollout(PROMPTS, GREEDY))
        expected = expected or hf_greedy(plain_copy(engine), PROMPTS, 5)
        assert found == expected


@stages_0_and_3
def test_containers_are_plans_and_change_nothing(stage):
    engine = hybrid_engine(stage)
    before = snapshot(engine)
    plans = engine.create_inference_module()
    assert [(plan.layer, plan.path) for plan in plans] == [(i, "fused") for i in range(3)]
    assert isinstance(plans[0].description, LayerDescription)
    assert (plans[0].description.num_heads, plans[0].description.num_kv_heads) == (4, 2)
    later = engine.create_inference_containers(engine.module, layer_id=10)
    assert [plan.layer for plan in later] == [10, 11, 12]
    layer = engine.module.model.layers[1]
    one = engine.new_inference_container(layer, describe_from_structure, 1)
    assert (one.layer, one.description) == (1, plans[1].description)
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    assert engine.populate_all_inference_policies()[name](layer) == plans[1].description
    engine.convert_to_linear_transposed(engine.module)
    assert differences(before, snapshot(engine)) == []


def test_shared_prefill_checks_its_sizes_and_repeats_nothing():
    engine = hybrid_engine(0)
    engine.prepare_shared_prefill(2, 4, 16)
    assert engine.repeat_shared_prefill_cache(2, 4) == ()
    for sizes in ((0, 4, 16), (2, 0, 16), (2, 4, 0)):
        with pytest.raises(ConfigError, match="prepare_shared_prefill"):
            engine.prepare_shared_prefill(*sizes)


@stages_0_and_3
def test_lora_fusing_is_nothing_without_adapters_and_an_error_with_them(stage):
    from peft import LoraConfig, get_peft_model

    engine = hybrid_engine(stage)
    before = snapshot(engine)
    engine.fuse_lora_weight()
    engine.unfuse_lora_weight()
    engine.unfuse_lora_weight_non_pinned()
    assert differences(before, snapshot(engine)) == []
    if stage == 0:
        get_peft_model(engine.module, LoraConfig(target_modules=["q_proj"], r=2))
        with pytest.raises(ConfigError, match="LoRA fusing is not available"):
            engine.fuse_lora_weight()


@stages_0_and_3
def test_zero3_forward_is_the_layers_own_forward_on_whole_weights(stage):
    engine = hybrid_engine(stage, attention_dropout=0.0)
    copy = plain_copy(engine)
    hidden = torch.randn(1, 5, 64)
    positions = torch.arange(5)[None]
    cos_sin = copy.model.rotary_emb(hidden, positions)
    before = snapshot(engine)
    with torch.no_grad():
        for index in range(3):
            ours = engine._zero3_forward(index)(hidden, position_embeddings=cos_sin)
            hf = copy.model.layers[index](hidden, position_embeddings=cos_sin)
            assert torch.equal(ours, hf)
    assert differences(before, snapshot(engine)) == []
    for index in (-1, 3):
        with pytest.raises(ConfigError, match="expected 0 to 2"):
            engine._zero3_forward(index)


@stages_0_and_3
def test_the_modules_generate_is_served_too(stage):
    engine = hybrid_engine(stage)
    out = engine.module.generate(IDS, max_new_tokens=5, do_sample=False)
    assert engine.stats.path == "fused"
    assert [out[0, 3:].tolist()] == hf_greedy(plain_copy(engine), IDS.tolist(), 5)


@stages_0_and_3
def test_unwrap_undoes_wrap_exactly(stage):
    engine = plain_engine(stage)
    before = (type(engine), snapshot(engine), dict(engine.module.__dict__))
    wrapped = tritonhybrid.wrap(engine)
    assert wrapped is engine
    assert isinstance(engine, HybridEngine)
    assert isinstance(engine, before[0])
    engine.rollout(PROMPTS, GREEDY)
    engine.generate(IDS, max_new_tokens=3, do_sample=False)
    assert tritonhybrid.unwrap(engine) is engine
    assert type(engine) is before[0]
    assert differences(before[1], snapshot(engine)) == []
    assert list(engine.module.__dict__) == list(before[2])
    assert all(engine.module.__dict__[k] is v for k, v in before[2].items())
    with pytest.raises(tritonhybrid.EngineStateError, match="not wrapped"):
        tritonhybrid.unwrap(engine)
    losses = [micro_step(engine, index) for index in range(2)]
    twin = plain_engine(stage)
    assert losses == [micro_step(twin, index) for index in range(2)]
    tritonhybrid.wrap(engine)
    assert tokens(engine.rollout(PROMPTS, GREEDY)) == hf_greedy(plain_copy(engine), PROMPTS, 5)


def test_unwrap_gives_back_a_generate_that_the_module_had():
    engine = plain_engine(0)
    calls = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(engine.module).generate(engine.module, *args, **kwargs)

    engine.module.generate = own
    tritonhybrid.wrap(engine)
    out = engine.module.generate(IDS, max_new_tokens=3, do_sample=False)
    assert len(calls) == 1
    assert [out[0, 3:].tolist()] == hf_greedy(plain_copy(engine), IDS.tolist(), 3)
    tritonhybrid.unwrap(engine)
    assert engine.module.__dict__["generate"] is own
