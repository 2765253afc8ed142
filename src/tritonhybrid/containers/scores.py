"""Attention scores so high that a cap on them shows, whatever the model's weights are.

Two tiny prompts give scores of a few units, where a cap of 50 changes less than rounding does in
bf16. So queries and keys are lifted for a while, in HF's layer and in our container by the same
hooks: ``tanh(x) + a`` with ``scale * E * a^2 = 100``. Uncapped, softmax doesn't see what all scores
share; capped, it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tritonhybrid.containers.description import LayerDescription
from tritonhybrid.containers.patches import Patches

# Relative L2 of what attention gives. HF's eager attention, which rounds the scores themselves,
# is off by 0.05 in bf16 (SmolLM2-135M) and 0.005 in fp16; a cap of 50 moves it by 0.36 and more.
SCORE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
_SCORE = 100.0


@contextmanager
def high_scores(layer: nn.Module, description: LayerDescription) -> Iterator[list[torch.Tensor]]:
    """Lift a layer's queries and keys; its weights are not touched.

    Bind the layer's container inside, so that it calls the projections that are watched.

    Args:
        layer: The HF layer.
        description: What it is said to compute.

    Yields:
        A list to which every run of the layer, HF's or ours, adds what attention gave: [T, H * E].
    """
    d = description
    lift = (_SCORE / (d.scale * d.head_dim)) ** 0.5
    attended: list[torch.Tensor] = []

    def raise_output(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.tanh().add_(lift)

    def keep_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        attended.append(args[0].flatten(0, -2))

    patches = Patches()
    handles = [layer.get_submodule(d.o_proj).register_forward_pre_hook(keep_input)]
    try:
        for path in (d.q_proj, d.k_proj):
            handles.append(layer.get_submodule(path).register_forward_hook(raise_output))
        if d.qk_norm_eps is not None:
            # A norm takes the lift away again; its weight gives it back.
            for path in (d.q_norm, d.k_norm):
                norm = layer.get_submodule(path)
                patches.set(norm, "weight", torch.full_like(norm.weight, lift))  # type: ignore[arg-type]
        yield attended
    finally:
        patches.undo()
        for handle in handles:
            handle.remove()
