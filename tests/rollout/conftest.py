"""A small Llama behind a wrapped engine's rollout, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tritonhybrid.engine import HybridEngine
from tritonhybrid.testing import hold


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()


@pytest.fixture
def engine_of(model: LlamaForCausalLM) -> Callable[..., HybridEngine]:
    """Return a function from settings to an engine over the shared weights."""

    def make(tokenizer: Any = None, **settings: Any) -> HybridEngine:
        return hold(model, config={"block_size": 16, **settings}, tokenizer=tokenizer)

    return make


@pytest.fixture
def engine(engine_of: Callable[..., HybridEngine]) -> HybridEngine:
    return engine_of()
