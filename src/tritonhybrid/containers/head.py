"""The output projection: facts, logits, and what the fused sampler needs."""

from __future__ import annotations

from typing import Any

import torch

from tritonhybrid.containers.parts import ModelParts
from tritonhybrid.containers.projection import Projection
from tritonhybrid_kernels.ops import Ops


class Head:
    """From hidden states to logits, as the model's own forward does it.

    Args:
        parts: The model; the head's parameters must be whole.
        ops: The operations to call.
    """

    def __init__(self, parts: ModelParts, ops: Ops) -> None:
        self.ops = ops
        self.projection = Projection(parts.head)
        config: Any = parts.config
        scaling = getattr(config, "logits_scaling", None)
        self.scale = float(getattr(config, "logit_scale", None) or (1 / scaling if scaling else 1))
        self.divisor = float(scaling) if scaling else None
        cap = getattr(config, "final_logit_softcapping", None)
        self.softcap = float(cap) if cap else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32, rounded on the way where HF rounds.

        Args:
            hidden: [B, D].

        Returns:
            [B, V] float32.
        """
        p = self.projection
        z = self.ops.linear(hidden, p.weight, p.bias) if p.is_raw else p(hidden)
        if self.divisor is not None:
            z = z / self.divisor
        elif self.scale != 1:
            z = z * self.scale
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return z.float()
