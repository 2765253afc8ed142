"""A linear layer as a container calls it: its weight read raw, or the module called."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

_HF_CAPTURE = "transformers.utils.output_capturing"


class Projection:
    """One output projection ``[T, in] -> [T, out]``.

    The weight is read raw only where that is all the module does: exactly
    ``nn.Linear``, no hooks, no parametrisation, no forward of its own. Anything
    else (a PEFT or quantised layer, a subclass) is called as the module it is.

    Args:
        module: The layer's submodule; its parameters must be whole.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.is_raw = is_plain(module, nn.Linear)
        # .detach() follows the storage the parameter has now: the arena's under ZeRO-3.
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if self.is_raw:
            assert isinstance(module, nn.Linear)
            self.weight = module.weight.detach()
            self.bias = module.bias.detach() if module.bias is not None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Call the module on ``[T, in]`` as HF would on ``[1, T, in]``."""
        y: torch.Tensor = self.module(x.unsqueeze(0))
        return y.squeeze(0)


def is_plain(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether a module does what its class says and nothing else.

    Args:
        module: Asked about; DeepSpeed's own hooks have been set aside before.
        kind: The exact type it must have; None leaves the type to the caller.
    """
    if kind is not None and type(module) is not kind:
        return False
    return not (has_hooks(module) or parametrize.is_parametrized(module)) and (
        "forward" not in module.__dict__
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward hook (a user's, by now) watches the module.

    Those that transformers leaves behind after a first call with ``output_hidden_states``
    record nothing outside such calls and don't count.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != _HF_CAPTURE for hook in hooks)
