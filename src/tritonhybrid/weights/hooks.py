"""DeepSpeed's module hooks set aside for a rollout, and every module in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from tritonhybrid.interrupts import InterruptsHeld


@contextmanager
def deepspeed_hooks_aside(module: nn.Module) -> Iterator[None]:
    """Take DeepSpeed's forward hooks off every submodule; a user's own stay.

    They would fetch and free partitioned parameters layer by layer, count
    throughput and toggle ZeRO-3's parameter discovery. The hook dictionaries keep
    their identity and order, so the handles DeepSpeed holds stay valid.

    Args:
        module: The module DeepSpeed trains.
    """
    saved: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for submodule in module.modules():
        for hooks in (submodule._forward_pre_hooks, submodule._forward_hooks):
            if any(_is_deepspeed(hook) for hook in hooks.values()):
                saved.append((hooks, dict(hooks)))
    try:
        for hooks, before in saved:
            for key, hook in before.items():
                if _is_deepspeed(hook):
                    del hooks[key]
        yield
    finally:
        with InterruptsHeld():
            for hooks, before in saved:
                # A hook that the user added or removed meanwhile stays as the user left it.
                now = dict(hooks)
                hooks.clear()
                for key, hook in before.items():
                    if _is_deepspeed(hook) or key in now:
                        hooks[key] = hook
                for key, hook in now.items():
                    hooks.setdefault(key, hook)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[bool]:
    """Dropout off and gradient checkpointing inert, each submodule's mode put back.

    Flags are set directly: a model's own ``train()`` may do more than set them.

    Yields:
        Whether any submodule was in training mode.
    """
    training = [submodule for submodule in module.modules() if submodule.training]
    try:
        for submodule in training:
            submodule.training = False
        yield bool(training)
    finally:
        with InterruptsHeld():
            for submodule in training:
                submodule.training = True


@contextmanager
def plain_linear() -> Iterator[None]:
    """Torch's own ``nn.functional.linear`` in place of the one ZeRO-3 leaves behind.

    DeepSpeed swaps it, process-wide, for an autograd function that saves training
    memory and costs 0.2 ms of host time a call; a rollout has no backward.
    """
    swapped = nn.functional.linear
    is_deepspeed = _is_deepspeed(swapped)
    if is_deepspeed:
        nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        if is_deepspeed:
            nn.functional.linear = swapped


def _is_deepspeed(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__module__", None) or type(hook).__module__
    return str(owner).partition(".")[0] == "deepspeed"
