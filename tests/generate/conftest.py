"""A small Llama under a real DeepSpeed engine on one rank, wrapped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import tritonhybrid
from tritonhybrid.local_engine import join_ranks

# The cases of docs/generate.md are imported by name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not dist.is_initialized():
        rendezvous: Path = tmp_path_factory.mktemp("ranks") / "meeting"
        join_ranks(0, 1, "cpu", rendezvous)


@pytest.fixture
def wrapped() -> Callable[..., Any]:
    """Return a function from a model to its wrapped engine; pages hold 16 tokens."""

    def wrap(model: Any, **settings: Any) -> Any:
        engine, *_ = deepspeed.initialize(
            model=model, config={"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}
        )
        engine.eval()
        return tritonhybrid.wrap(engine, config={"block_size": 16, **settings})

    return wrap


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
            max_position_embeddings=128,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()


@pytest.fixture
def engine(model: LlamaForCausalLM, wrapped: Callable[..., Any]) -> Any:
    engine = wrapped(model)
    yield engine
    tritonhybrid.unwrap(engine)
