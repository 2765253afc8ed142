"""What wrap refuses, in which words, leaving the engine as plain as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import VOCAB, llama_config, plain_engine, tokens

import tritonhybrid
from tritonhybrid import ConfigError, EngineStateError, SamplingParams, UnsupportedModelError

GREEDY = SamplingParams(max_new_tokens=5, temperature=0.0)
PROMPTS = [[5, 6, 7], [8, 9]]

# Rule: expected this, got that. What to do.
FOUR_PARTS = re.compile(r"^[^:].+: expected .+, got .+\. .+\.$", re.DOTALL)


def test_only_an_engine_can_be_wrapped():
    model = torch.nn.Linear(2, 2)
    for thing in (model, None, "engine", type(plain_engine(0))):
        with pytest.raises(EngineStateError, match="wrap takes a DeepSpeed engine") as caught:
            tritonhybrid.wrap(thing)
        assert FOUR_PARTS.match(str(caught.value))


def test_deepspeeds_own_hybrid_engine_is_refused():
    class DeepSpeedHybridEngine(type(plain_engine(0))):
        """Stands in for DeepSpeed's, which can't be built without CUDA."""

    engine = plain_engine(0)
    engine.__class__ = DeepSpeedHybridEngine
    with pytest.raises(EngineStateError, match='"enabled": true') as caught:
        tritonhybrid.wrap(engine)
    assert FOUR_PARTS.match(str(caught.value))


def encoder() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )


def encoder_decoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def headless() -> Any:
    from transformers import LlamaModel

    return LlamaModel(llama_config())


@pytest.mark.parametrize(
    "build", [encoder, encoder_decoder, headless, lambda: torch.nn.Linear(4, 4)]
)
def test_models_that_cannot_generate_are_refused_and_stay_as_they_were(build):
    engine = plain_engine(0, model=build())
    before = (type(engine), tuple(engine.__dict__), tuple(engine.module.__dict__))
    with pytest.raises(UnsupportedModelError, match="causal language models") as caught:
        tritonhybrid.wrap(engine)
    assert FOUR_PARTS.match(str(caught.value)), str(caught.value)
    assert (type(engine), tuple(engine.__dict__), tuple(engine.module.__dict__)) == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_num_seq": 4}, "max_num_seq"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": "big"}, "block_size"),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens"),
        ({"backend": "cuda"}, "backend"),
        ({"backend": "triton"}, "CUDA"),
        ({"torch_ops": ("no_such_op",)}, "no_such_op"),
        ({"torch_ops": "linear"}, "torch_ops"),
        ({"release_inference_cache": "yes"}, "release_inference_cache"),
        ({"sync_timeout_s": 0}, "sync_timeout_s"),
        ({"sync_timeout_s": "long"}, "sync_timeout_s"),
        ({"inference_tp_size": 2}, "inference_tp_size"),
        ({"decode_steps_per_replay": 0}, "decode_steps_per_replay"),
        ({"decode_steps_per_replay": "many"}, "decode_steps_per_replay"),
        ({"enable_cuda_graph": True}, "enable_cuda_graph"),
        ({"consistent": True}, "consistent"),
        ({"consistent": "sometimes"}, "consistent"),
        ({"enable_cuda_graph": "sometimes"}, "enable_cuda_graph"),
        ({"pin_parameters": False}, "pin_parameters"),
        (5, "config"),
    ],
)
def test_wrap_refuses_settings_and_leaves_the_engine_plain(config, words):
    engine = plain_engine(0)
    before = (type(engine), tuple(engine.__dict__), tuple(engine.module.__dict__))
    with pytest.raises(ConfigError, match=words) as caught:
        tritonhybrid.wrap(engine, config=config)
    assert FOUR_PARTS.match(str(caught.value)), str(caught.value)
    assert (type(engine), tuple(engine.__dict__), tuple(engine.module.__dict__)) == before
    tritonhybrid.wrap(engine)
    assert len(tokens(engine.rollout(PROMPTS, GREEDY))) == 2
