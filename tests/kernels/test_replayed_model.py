"""A model's decode steps as graphs have them, in Triton: padding rows, pages, the ring."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tritonhybrid
from tritonhybrid import SamplingParams
from tritonhybrid.decode_graphs import CudaCapture
from tritonhybrid.local_engine import (
    LocalEngineConfig,
    build_engine,
    choose_device,
)
from tritonhybrid.recording import python_capture

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], list(range(20, 35))]
NEW = 6

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    device = choose_device("auto")
    built = build_engine(
        LlamaForCausalLM(LlamaConfig(**SIZES)), LocalEngineConfig(zero_stage=3, device=device)
    )
    engine = tritonhybrid.wrap(built, config={"block_size": 16})
    yield engine
    tritonhybrid.unwrap(engine)
    engine.destroy()


@pytest.mark.parametrize(
    "sampling",
    [
        [
            SamplingParams(max_new_tokens=NEW, temperature=0),
            SamplingParams(max_new_tokens=NEW, seed=3, eos_token_id=list(range(0, 101, 7))),
            SamplingParams(max_new_tokens=NEW - 2, seed=4),
        ],
        SamplingParams(max_new_tokens=NEW, seed=3, top_k=20, top_p=0.9, min_p=0.01),
    ],
    ids=["fused", "filters"],
)
def test_replays_sample_what_single_steps_do(engine, sampling):
    single = engine.rollout(PROMPTS, sampling)
    assert single.stats.backend == "triton" and single.stats.graph_hits == 0
    replays = engine._tritonhybrid.generation.replays
    on_cuda = engine.device.type == "cuda"
    replays.capture_override = CudaCapture if on_cuda else python_capture
    replayed = engine.rollout(PROMPTS, sampling)
    replays.capture_override = None
    assert replayed.stats.graph_reason == ""
    # Five tokens after the first: four in one replay, one in another.
    assert replayed.stats.graph_captures == replayed.stats.graph_hits == 2
    for mine, theirs in zip(replayed.completions, single.completions, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.finish_reason == theirs.finish_reason
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert mine.raw_logprobs == pytest.approx(theirs.raw_logprobs, abs=1e-5)
