"""A whole model under ZeRO-3 with every operation in Triton: Hugging Face's tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import tritonhybrid
from tritonhybrid import SamplingParams
from tritonhybrid.local_engine import (
    LocalEngineConfig,
    build_engine,
)
from tritonhybrid_kernels.ops import OP_NAMES

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], list(range(20, 41))]
NEW = 5

pytestmark = pytest.mark.usefixtures("one_rank")


def _model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SIZES))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prefill_and_four_decode_steps_give_hfs_tokens(family: str, device: torch.device) -> None:
    model = _model(family)
    reference = copy.deepcopy(model).to(device).eval()
    engine = tritonhybrid.wrap(
        build_engine(model, LocalEngineConfig(zero_stage=3, device=device.type)),
        config={"block_size": 16},
    )
    ops = engine._tritonhybrid.generation.ops()
    assert [getattr(ops, name).__name__ for name in OP_NAMES] == list(OP_NAMES)
    out = engine.rollout(PROMPTS, SamplingParams(max_new_tokens=NEW, temperature=0))
    assert out.stats.backend == "triton"
    assert out.stats.path == "fused"
    assert out.stats.strategy == "pinned"
    assert out.stats.num_decode_steps == NEW - 1
    for prompt, completion in zip(PROMPTS, out.completions, strict=True):
        ids = torch.tensor([prompt], device=device)
        expected = reference.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
        with torch.no_grad():
            logits = reference(expected).logits[0].double().log_softmax(-1)
        for step, (token, logprob) in enumerate(
            zip(completion.token_ids, completion.logprobs, strict=True)
        ):
            assert logprob == pytest.approx(float(logits[len(prompt) - 1 + step, token]), abs=2e-4)
    tritonhybrid.unwrap(engine)
    engine.destroy()
