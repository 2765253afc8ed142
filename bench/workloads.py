"""The shapes and request patterns that every bench names, in one place.

Weights are random: speed depends on shapes, not on what a model has learnt. Prompts are seeded,
so every provider answers the same tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch

# Token 0 is the pad token of every provider and never part of a prompt.
PAD_TOKEN = 0

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Hugging Face causal LM by its sizes; `family` is the config's ``model_type``."""

    name: str
    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    rope_theta: float = 10_000.0
    max_positions: int = 8192

    def config(self) -> Any:
        from transformers import AutoConfig

        sizes = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            # The family's own defaults may name ids beyond a small vocabulary.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": PAD_TOKEN,
        }
        # Qwen2 derives its head size from the hidden size.
        if self.family != "qwen2":
            sizes["head_dim"] = self.head_dim
        return AutoConfig.for_model(self.family, **sizes)

    def weight_bytes(self, element_size: int) -> int:
        """Bytes a decode step has to read: all layers and the head, not the embedding rows."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        head = self.vocab_size * self.hidden_size
        return (self.num_layers * (attention + mlp) + head) * element_size


def build_model(shape: ModelShape, dtype: torch.dtype, device: str, *, seed: int = 0) -> Any:
    """Return the model with seeded random weights, in eval mode, with EOS off."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_TOKEN
    return model.eval()


CPU_MODEL = ModelShape(
    name="qwen2-h512-l8",
    family="qwen2",
    hidden_size=512,
    intermediate_size=2048,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=32_000,
    tied=False,
)

TINY_MODEL = ModelShape(
    name="qwen3-tiny",
    family="qwen3",
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
    tied=False,
)

LLAMA_8B = ModelShape(
    name="llama-3.1-8b",
    family="llama",
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128_256,
    tied=False,
    rope_theta=500_000.0,
)

QWEN3_1_7B = ModelShape(
    name="qwen3-1.7b",
    family="qwen3",
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
    tied=True,
    rope_theta=1_000_000.0,
)

QWEN3_0_6B = replace(QWEN3_1_7B, name="qwen3-0.6b", hidden_size=1024, intermediate_size=3072)

# Smallest first: what is measured before a time-out is the most that can be had.
GPU_MODELS = {shape.name: shape for shape in (QWEN3_0_6B, QWEN3_1_7B, LLAMA_8B)}
TINY_MODELS = {TINY_MODEL.name: TINY_MODEL}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of one length, `n` samples each, with a prescribed number of new tokens a prompt."""

    name: str
    model: ModelShape
    prompt_len: int
    new_tokens: tuple[int, ...]
    n: int = 1
    ranks: int = 1

    @property
    def num_prompts(self) -> int:
        return len(self.new_tokens)

    @property
    def longest(self) -> int:
        return max(self.new_tokens)

    @property
    def is_ragged(self) -> bool:
        return len(set(self.new_tokens)) > 1

    @property
    def real_tokens(self) -> int:
        """Tokens asked for, on one rank; what a provider decodes beyond them does not count."""
        return self.n * sum(self.new_tokens)

    def lengths(self) -> list[int]:
        """New tokens of every sample, prompts in order, samples of a prompt adjacent."""
        return [length for length in self.new_tokens for _ in range(self.n)]

    def prompts(self, rank: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1000 + rank)
        shape = (self.num_prompts, self.prompt_len)
        return torch.randint(1, self.model.vocab_size, shape, generator=generator).tolist()

    def shrunk(self) -> Workload:
        """The same pattern on the tiny model with few tokens, to try the bench itself."""
        return replace(
            self,
            model=TINY_MODEL,
            prompt_len=min(self.prompt_len, 24),
            new_tokens=tuple(max(2, length // 10) for length in self.new_tokens[:6]),
            n=min(self.n, 4),
        )


def log_normal_lengths(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Return the quantiles of a log-normal whose first and last of `count` are the two ends.

    Response lengths of a policy are long-tailed; quantiles are such lengths without luck. They
    are dealt out in a fixed shuffled order, because no server knows them in advance.
    """
    normal = NormalDist()
    scores = [normal.inv_cdf((index + 0.5) / count) for index in range(count)]
    middle = math.log(shortest * longest) / 2
    spread = (math.log(longest) - middle) / scores[-1]
    lengths = [round(math.exp(middle + spread * score)) for score in scores]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(lengths[index] for index in order)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="uniform_b16", model=CPU_MODEL, prompt_len=64, new_tokens=(64,) * 16),
        Workload(name="batch_1", model=CPU_MODEL, prompt_len=64, new_tokens=(64,)),
        Workload(name="one_prompt_16x16", model=CPU_MODEL, prompt_len=512, new_tokens=(16,), n=16),
        Workload(name="one_prompt_16x64", model=CPU_MODEL, prompt_len=512, new_tokens=(64,), n=16),
        Workload(
            name="long_tail",
            model=CPU_MODEL,
            prompt_len=64,
            new_tokens=log_normal_lengths(32, 6, 160),
        ),
        Workload(
            name="zero3_two_ranks", model=CPU_MODEL, prompt_len=64, new_tokens=(16,) * 16, ranks=2
        ),
    )
}
