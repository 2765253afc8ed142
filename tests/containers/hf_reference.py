"""Prompts, and Hugging Face's own greedy tokens of each alone."""

from __future__ import annotations

from typing import Any

import torch


def prompts(*lengths: int) -> list[list[int]]:
    """Return random prompts of these lengths, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


def hf_alone(model: Any, prompt: list[int], max_new_tokens: int, **kwargs: Any) -> Any:
    """Return the new tokens; with return_dict_in_generate, all that generate returns."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )
    return out[0, len(prompt) :].tolist() if isinstance(out, torch.Tensor) else out
