"""One rank over gloo, and a wrapped ZeRO-3 engine beside its plain model."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import tritonhybrid
from tritonhybrid.local_engine import LocalEngineConfig, build_engine, join_ranks


@pytest.fixture(scope="session", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not dist.is_initialized():
        rendezvous: Path = tmp_path_factory.mktemp("ranks") / "meeting"
        join_ranks(0, 1, "cpu", rendezvous)


@pytest.fixture(scope="module")
def served():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=29,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    plain = copy.deepcopy(model).eval()
    engine = tritonhybrid.wrap(build_engine(model, LocalEngineConfig(zero_stage=3)))
    yield engine, plain
    tritonhybrid.unwrap(engine)
    engine.destroy()
