"""What a rollout must leave as it found it, written down so that two moments can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def snapshot(engine: Any) -> dict[str, Any]:
    """Write the training state down: hooks, parameters, modes, generators, configs, attributes."""
    module: nn.Module = engine.module
    state: dict[str, Any] = {
        "F.linear": id(nn.functional.linear),
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "grad enabled": torch.is_grad_enabled(),
        "state_dict keys": tuple(module.state_dict().keys()),
        "engine attributes": tuple(engine.__dict__),
    }
    for name, submodule in module.named_modules():
        state[f"{name} training"] = submodule.training
        state[f"{name} attributes"] = tuple(submodule.__dict__)
        state[f"{name} forward"] = id(submodule.__dict__.get("forward"))
        for kind in _HOOKS:
            hooks = getattr(submodule, kind)
            state[f"{name} {kind}"] = (id(hooks), [(k, id(h)) for k, h in hooks.items()])
        config = getattr(submodule, "config", None)
        if config is not None:
            state[f"{name} config"] = config.to_dict() | {"attn": config._attn_implementation}
    for name, parameter in module.named_parameters():
        state[f"{name} status"] = str(getattr(parameter, "ds_status", None))
        state[f"{name} data"] = (tuple(parameter.shape), parameter.data_ptr(), parameter.dtype)
        state[f"{name} requires_grad"] = parameter.requires_grad
        state[f"{name} grad"] = None if parameter.grad is None else parameter.grad.data_ptr()
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
