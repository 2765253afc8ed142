"""The output projection: executes any head description."""

from __future__ import annotations

import torch
from torch import nn

from tritonhybrid.containers.description import HeadDescription
from tritonhybrid.containers.projection import Projection
from tritonhybrid_kernels.ops import Ops


class Head:
    """From hidden states to logits, as the model's own forward does it.

    Args:
        module: The model's output embeddings; their parameters must be whole.
        description: What follows the projection.
        ops: The operations to call.
    """

    def __init__(self, module: nn.Module, description: HeadDescription, ops: Ops) -> None:
        self.description = description
        self.ops = ops
        self.projection = Projection(module)

    @property
    def scale(self) -> float:
        """Factor on the projection."""
        return self.description.scale

    @property
    def softcap(self) -> float | None:
        """Cap of the logits."""
        return self.description.softcap

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32, rounded on the way where HF rounds.

        Args:
            hidden: [B, D].

        Returns:
            [B, V] float32.
        """
        d, p = self.description, self.projection
        z = self.ops.linear(hidden, p.weight, p.bias) if p.is_raw else p(hidden)
        if d.divisor is not None:
            z = z / d.divisor
        elif d.scale != 1:
            z = z * d.scale
        if d.softcap is not None:
            z = torch.tanh(z / d.softcap) * d.softcap
        return z.float()
