"""DeepSpeed's rollout settings are honoured or refused, and its profile is filled."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.rollout import (
    HybridEngineRollout,
    RolloutConfig,
    RolloutRequest,
    SamplingConfig,
)
from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRolloutConfig

from tritonhybrid import TritonRollout

PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=None)


def request_() -> RolloutRequest:
    return RolloutRequest(PROMPTS, PROMPTS.ne(0).long())


class FieldsOfATrainer(RolloutConfig):
    """Not a dataclass: DeepSpeed reads what it knows and leaves the rest alone."""

    rounds = 7


@dataclasses.dataclass
class ExtendedConfig(HybridEngineRolloutConfig):
    speculative_tokens: int = 0
    stops: list = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    "cfg",
    [
        None,
        RolloutConfig(),
        RolloutConfig(engine="tritonhybrid"),
        HybridEngineRolloutConfig(
            use_shared_prefill=True, align_decode_fronts=True, enable_cache_trimming=True
        ),
        ExtendedConfig(),
        FieldsOfATrainer(),
        {"enable_profiling": True},
    ],
)
def test_settings_that_a_paged_cache_meets_are_taken(served, cfg):
    engine, plain = served
    batch = TritonRollout(engine, TOKENIZER, cfg).generate(
        request_(), SamplingConfig(max_new_tokens=3, temperature=0.0, n_samples_per_prompt=2)
    )
    expected = plain.generate(PROMPTS[1:], max_new_tokens=3, do_sample=False)
    assert torch.equal(batch.input_ids[2:], expected.repeat(2, 1))


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        (RolloutConfig(engine="vllm"), "cfg.engine"),
        (RolloutConfig(use_graph_capture=True), "cfg.use_graph_capture"),
        (HybridEngineRolloutConfig(continuous_cache_capacity=64), "cfg.continuous_cache_capacity"),
        (ExtendedConfig(speculative_tokens=4), "cfg.speculative_tokens"),
        (ExtendedConfig(stops=["."]), "cfg.stops"),
        ({"use_graph_captures": False}, "cfg.use_graph_captures"),
    ],
)
def test_settings_that_cannot_be_honoured_are_value_errors_by_name(served, cfg, name):
    with pytest.raises(ValueError, match=name):
        TritonRollout(served[0], TOKENIZER, cfg)


def deepspeeds_continuous_profile() -> dict:
    """The profile that DeepSpeed's continuous mode would leave, without a model in between."""
    rollout = HybridEngineRollout(None, TOKENIZER)
    start = time.perf_counter()
    profile = {
        "accelerator": get_accelerator(),
        "start": start,
        "active_batch_sizes": [2],
    } | dict.fromkeys(
        (
            "prefill_forward_ms",
            "decode_forward_ms",
            "scheduler_overhead_ms",
            "cache_management_overhead_ms",
            "num_prefill_forwards",
            "num_decode_forwards",
        ),
        0,
    )
    rollout._finish_continuous_profile(profile, request_(), {0: [1], 1: [2]}, 2, 5, start, start)
    return rollout.get_last_profile()


def test_the_profile_has_deepspeeds_keys_and_the_calls_own_figures(served):
    engine, plain = served
    cfg = HybridEngineRolloutConfig(enable_profiling=True)
    rollout = TritonRollout(engine, TOKENIZER, cfg)
    assert rollout.get_last_profile() is None
    theirs = HybridEngineRollout(SimpleNamespace(module=plain), TOKENIZER, cfg)
    sampling = SamplingConfig(max_new_tokens=4, temperature=0.0, n_samples_per_prompt=2)
    theirs.generate(request_(), sampling)
    batch = rollout.generate(request_(), sampling)
    profile, stats = rollout.get_last_profile(), engine.stats
    assert profile.keys() == theirs.get_last_profile().keys()
    for name in (
        "num_generated_tokens",
        "batch_size",
        "num_samples_per_prompt",
        "prompt_length",
        "response_length",
    ):
        assert profile[name] == theirs.get_last_profile()[name]
    assert profile["num_generated_tokens"] == int(batch.attention_mask[:, 5:].sum()) == 16
    assert profile["num_decode_forwards"] == stats.num_decode_steps
    assert profile["prefill_forward_ms"] == 1000 * stats.prefill_s > 0
    assert profile["decode_forward_ms"] == 1000 * stats.decode_s > 0
    assert profile["generation_ms"] >= 1000 * stats.total_s
    parts = ("prefill_forward_ms", "decode_forward_ms", "generation_overhead_ms")
    assert sum(profile[part] for part in parts) == pytest.approx(profile["generation_ms"])
    parts = ("prompt_expansion_ms", "generation_ms", "post_processing_ms")
    assert sum(profile[part] for part in parts) == pytest.approx(profile["total_ms"])
    assert profile["tokens_per_second"] == pytest.approx(16_000 / profile["total_ms"])


def test_the_continuous_profile_has_deepspeeds_keys(served):
    engine, _ = served
    rollout = TritonRollout(engine, TOKENIZER, {"enable_profiling": True})
    rollout.generate(request_(), SamplingConfig(4, n_samples_per_prompt=2, continuous_batch_size=3))
    profile, stats = rollout.get_last_profile(), engine.stats
    assert profile.keys() == deepspeeds_continuous_profile().keys()
    assert profile["active_batch_size"] == profile["continuous_batch_size"] == 3
    assert profile["num_prefill_forwards"] == stats.num_prefill_steps
    assert 0 <= profile["scheduler_overhead_ms"] < profile["generation_ms"]
    # A bound above the rows is no count of them.
    rollout.generate(request_(), SamplingConfig(4, continuous_batch_size=64))
    assert rollout.get_last_profile()["active_batch_size"] == 2


def test_without_profiling_there_is_no_profile(served):
    rollout = TritonRollout(served[0], TOKENIZER, RolloutConfig())
    rollout.generate(request_(), SamplingConfig(max_new_tokens=2))
    assert rollout.get_last_profile() is None
