"""Tiny Llamas under DeepSpeed, their plain copies, and what Hugging Face says of those."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tritonhybrid

VOCAB = 101
EOS = 2


def llama_config(**overrides: Any) -> LlamaConfig:
    """A Llama of three layers whose logits spread enough for greedy tokens to be clear."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": 0.1,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        # HF's reference attention; it has the dropout that the config names.
        "attn_implementation": "eager",
    }
    return LlamaConfig(**(settings | overrides))


def build_model(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """The same weights on every rank and in every process."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**overrides)).to(dtype)


def plain_engine(
    stage: int,
    *,
    dtype: torch.dtype = torch.float32,
    accumulation: int = 1,
    model: Any = None,
    lr: float = 3e-3,
    persistence: int = 0,
    json: dict[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """A DeepSpeed engine that trains and knows nothing of us.

    ZeRO-3 leaves parameters of up to ``persistence`` elements whole, 100,000 by default, which
    is more than any of ours has; 0 partitions all. ``json`` adds to DeepSpeed's config.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = persistence
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": lr, "weight_decay": 0.0, "torch_adam": True},
        },
        "zero_optimization": zero,
    }
    if dtype is torch.bfloat16:
        config["bf16"] = {"enabled": True}
    config |= json or {}
    model = model if model is not None else build_model(dtype, **overrides)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=config,
    )
    torch.manual_seed(1234 + torch.distributed.get_rank())
    return engine


def hybrid_engine(stage: int, *, config: Any = None, **settings: Any) -> Any:
    """The same, wrapped."""
    return tritonhybrid.wrap(plain_engine(stage, **settings), config=config)


def micro_step(engine: Any, index: int) -> float:
    """One forward, backward and ``step()`` on data of this rank and index; returns the loss."""
    loss = forward(engine, index)
    engine.backward(loss)
    engine.step()
    return loss.item()


def forward(engine: Any, index: int) -> torch.Tensor:
    """The loss of a training forward on data of this rank and index."""
    generator = torch.Generator().manual_seed(7919 * index + torch.distributed.get_rank())
    ids = torch.randint(3, VOCAB, (2, 12), generator=generator)
    return engine(input_ids=ids, labels=ids).loss


def ragged_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def plain_copy(engine: Any) -> Any:
    """A module outside DeepSpeed with the engine's weights of now; every rank must call this."""
    module = engine.module
    with torch.random.fork_rng(devices=[]):
        clone = type(module)(copy.deepcopy(module.config)).to(next(module.parameters()).dtype)
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        clone.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
    return clone.eval()


@torch.no_grad()
def hf_greedy(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: int | None = EOS
) -> list[list[int]]:
    """HF's own greedy tokens, each prompt alone so that nothing is padded."""
    completions = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=0,
        )
        completions.append(out[0, len(prompt) :].tolist())
    return completions


@torch.no_grad()
def hf_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Log-probability of each completion token in HF's forward, softmax in fp64."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def tokens(output: tritonhybrid.RolloutOutput) -> list[list[int]]:
    """The completions' token ids, in order."""
    return [completion.token_ids for completion in output.completions]
