"""Tiny random models of the families, built so that a wrong rule shows.

Weights are large enough for varied tokens, biases and norm weights are random, and windows are
shorter than the prompts of ``check_family``. Run as a script it writes docs/families.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TABLE = Path(__file__).parents[2] / "docs/families.md"

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Args:
        path: Which path serves it.
        settings: Of its config.
        note: What the tiny model has that matters here.
        base: Settings that come first.
        since: Release of transformers that made this path possible; before, it is hf.
    """

    path: str
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    base: dict[str, Any] = field(default_factory=lambda: _COMMON)
    since: str = "5"

    @property
    def remarks(self) -> str:
        """The note, and with which transformers the path holds if not with all."""
        limit = f"hf before transformers {self.since}" if self.since != "5" else ""
        return "; ".join(filter(None, (self.note, limit)))

    @property
    def served(self) -> str:
        """Which path serves it with the transformers at hand."""
        return self.path if Version(transformers.__version__) >= Version(self.since) else "hf"


def _window(layers: int = 2, **more: Any) -> dict[str, Any]:
    return {"sliding_window": 12, "num_hidden_layers": layers, **more}


FAMILIES: dict[str, Family] = {
    "llama": Family("fused"),
    "qwen2": Family("fused", note="bias on q, k and v"),
    "qwen3": Family("fused", note="norms on q and k"),
    "mistral": Family("fused", _window(), "sliding window"),
    "gemma": Family("fused", note="norm weights plus one"),
    "gemma2": Family("generic", _window(4), "soft caps, windows on every second layer"),
    "gemma3_text": Family("generic", _window(6), "windows on five of six layers, two ropes"),
    "phi": Family("generic", {"partial_rotary_factor": 0.5}, "parallel residual, partial rope"),
    "phi3": Family("generic", _window(head_dim=None), "sliding window"),
    "gpt2": Family("generic", base=_GPT2),
    "gpt_bigcode": Family("generic", base=_GPT2),
    "gpt_neox": Family("generic", {"rotary_pct": 0.5}, "parallel residual, partial rope"),
    "opt": Family("generic", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "starcoder2": Family("generic", _window(), "sliding window"),
    "olmo": Family("generic"),
    "olmo2": Family("generic", note="norms after the sublayers"),
    "olmo3": Family("generic", _window(4), "windows on three of four layers"),
    "olmoe": Family("generic", {**_EXPERTS, "head_dim": None}, "experts"),
    "granite": Family(
        "generic",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
        "multipliers, scaled logits",
    ),
    "granitemoe": Family("generic", _EXPERTS, "experts"),
    "cohere": Family("generic", {"logit_scale": 0.5}, "parallel residual, scaled logits"),
    "cohere2": Family("generic", _window(4, logit_scale=0.5), "layers without rope, windows"),
    "mixtral": Family("generic", {**_EXPERTS, **_window()}, "experts, sliding window"),
    "qwen2_moe": Family("generic", {**_EXPERTS, "shared_expert_intermediate_size": 32}, "experts"),
    "qwen3_moe": Family("generic", _EXPERTS, "experts, norms on q and k"),
    "smollm3": Family(
        "generic",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
        "layers without rope",
    ),
    "gpt_oss": Family(
        "generic",
        {**_EXPERTS, **_window(), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "attention sinks, experts, windows on every second layer",
    ),
    "stablelm": Family("generic", {"head_dim": None}, "parallel residual, partial rope"),
    "persimmon": Family("generic", {"head_dim": None}),
    "helium": Family("generic"),
    "glm": Family("generic"),
    "glm4": Family("generic"),
    "glm4_moe": Family("generic", _EXPERTS, "experts"),
    "ministral": Family("fused", _window(), "sliding window"),
    "deepseek_v2": Family("hf", {**_EXPERTS, **_LATENT}, "latent attention, experts"),
    "deepseek_v3": Family("hf", {**_EXPERTS, **_LATENT}, "latent attention, experts"),
    "nemotron": Family("generic", since="5.13"),
    "biogpt": Family("generic", {"head_dim": None}),
    "xglm": Family("hf", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "init_std": 0.2}),
    "codegen": Family(
        "generic",
        {"rotary_dim": 4},
        "parallel residual",
        base=_GPT2,
        since="5.24",
    ),
    "vaultgemma": Family("generic", _window()),
    "apertus": Family("generic"),
    "arcee": Family("generic"),
    "nanochat": Family("generic"),
    "llama4_text": Family(
        "hf",
        {
            **_EXPERTS,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 16,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 1, 1, 0],
        },
        "chunked attention",
    ),
    "exaone4": Family("generic", _window(4, sliding_window_pattern=4)),
    "seed_oss": Family("fused"),
    "hunyuan_v1_dense": Family("generic"),
    "ernie4_5": Family("generic"),
    "ernie4_5_moe": Family(
        "generic",
        {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
        "experts",
    ),
    "diffllama": Family("hf", note="two attentions a layer"),
    "doge": Family("hf", note="a mask of its own"),
    "bitnet": Family("generic"),
    "jetmoe": Family("hf", {"kv_channels": 8, "num_local_experts": 4}),
    "phimoe": Family("generic", _EXPERTS),
    "afmoe": Family("generic", {**_EXPERTS, **_window(), "num_dense_layers": 1}),
    "minimax_m2": Family("generic", _EXPERTS),
    "dots1": Family("generic", {**_EXPERTS, "n_shared_experts": 1}, "experts"),
    "cwm": Family("fused", _window(layer_types=["sliding_attention", "full_attention"])),
    "bloom": Family("hf", {"n_layer": 2, "n_head": 4}, "ALiBi"),
    "falcon": Family("hf", {"num_kv_heads": 1, "head_dim": None}),
    "gptj": Family(
        "generic",
        {"rotary_dim": 4},
        "parallel residual",
        base=_GPT2,
        since="5.24",
    ),
    "gpt_neo": Family(
        "hf",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 12,
        },
    ),
    "mpt": Family("hf", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, "ALiBi"),
    "mamba": Family("hf"),
    "bamba": Family(
        "hf",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
        "Mamba layers",
    ),
    "lfm2": Family(
        "hf",
        {"layer_types": ["conv", "full_attention"], "head_dim": None},
        "convolution layers",
    ),
    "qwen3_next": Family(
        "hf",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "linear attention layers",
    ),
    "openai-gpt": Family("hf", base=_GPT2),
    "ctrl": Family("generic", {"dff": 48}, base=_GPT2, since="5.13"),
}


def build(name: str, **settings: Any) -> PreTrainedModel:
    """A model of the family in fp32, the same one each time.

    Args:
        name: Key of FAMILIES.
        settings: Over the family's own.
    """
    family = FAMILIES[name]
    chosen = {**family.base, **family.settings, **settings}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{k: v for k, v in chosen.items() if v is not None})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def table() -> str:
    """docs/families.md: which path serves which family."""
    order = {"fused": 0, "generic": 1, "hf": 2}
    rows = sorted(FAMILIES.items(), key=lambda item: (order[item[1].path], item[0]))
    lines = [
        "# Families",
        "",
        "Each row is proved by `tests/containers/test_families.py` on a tiny random model in fp32,",
        "trained for a step by real DeepSpeed engines, ZeRO 0 and ZeRO 3 (every parameter",
        "partitioned): greedy tokens of `rollout` and `generate` equal Hugging Face's on prompts",
        "of mixed length, log-probabilities lie within 2e-4 of an fp64 log-softmax of its forward,",
        "and the weights of a rollout are those that DeepSpeed gathers. No family is left out of",
        "ZeRO 3.",
        "",
        "The table is written by `python tests/containers/family_zoo.py`. Prove a family that is",
        "not here with `tritonhybrid.testing.check_family(model)`, or of a wrapped engine.",
        "",
        "- **fused**: every layer runs in our container.",
        "- **generic**: Hugging Face's own layer code over our attention and paged cache",
        "  (single layers may be fused).",
        "- **hf**: Hugging Face's own loop over whole weights, announced once. Slower, never",
        "  wrong.",
        "",
        "Rope with two tables (longrope) is native, each sequence on the table that Hugging Face's",
        "`generate` would take for it alone, `tests/containers/test_long_rope.py`. A sequence that",
        "outgrows the short table while it is sampled has log-probabilities that no single forward",
        "gives, there and here; `stats.notes` says so. Phi-3's family is computed anew at that",
        "point, from transformers 5.20 on; before, its `generate` goes wrong there and Hugging",
        "Face's loop serves calls that may reach it, as it does a padded batch in which a row may.",
        "Dynamic NTK rope is always served by Hugging Face's loop.",
        "",
        "Experts set to `eager`, whose loop asks the host which of them were hit, run as Hugging",
        "Face's `grouped_mm` inside a rollout, where the probe finds that they give the same;",
        "else `stats.notes` says that a decode step reads the host,",
        "`tests/containers/test_experts.py`.",
        "",
        "| Path | `model_type` | The tiny model has |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {family.path} | `{name}` | {family.remarks} |" for name, family in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table())
