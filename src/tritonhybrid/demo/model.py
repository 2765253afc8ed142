"""The demo's model."""

from __future__ import annotations

from transformers import LlamaConfig

from tritonhybrid.demo import task


def model_config() -> LlamaConfig:
    """Describe the demo's Llama: about 450 thousand parameters."""
    return LlamaConfig(
        vocab_size=task.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=task.PAD,
        bos_token_id=task.BOS,
        eos_token_id=task.EOS,
    )
