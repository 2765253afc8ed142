"""wrap and unwrap: a DeepSpeed engine upgraded in place, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from tritonhybrid.config import HybridConfig, resolve
from tritonhybrid.containers.parts import causal_model
from tritonhybrid.engine import STATE, HybridEngine, state_of
from tritonhybrid.engine_state import EngineState, world_size
from tritonhybrid.errors import EngineStateError, explain
from tritonhybrid.generation import Generation
from tritonhybrid.served_generate import give_back, take_over
from tritonhybrid.weights.source import WeightSource


def wrap(
    engine: Any,
    *,
    config: HybridConfig | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> HybridEngine:
    """Give a DeepSpeed engine serving-class generation, in place.

    On several ranks every rank must call this together, whatever the ZeRO stage (the
    seed of rank 0 is shared, and with ZeRO-3 a process group for error reports made).

    Args:
        engine: What ``deepspeed.initialize`` returned, ZeRO stage 0 to 3.
        config: Settings over the ``hybrid_engine`` block of the engine's JSON.
        tokenizer: For stop strings and decoded text.

    Returns:
        The same object.

    Raises:
        EngineStateError: Not a DeepSpeed engine, or wrapped already, or
            DeepSpeed's own hybrid engine.
        ConfigError: A setting is refused.
        UnsupportedModelError: The model can't generate.
    """
    _check_engine(engine)
    raw = getattr(engine._config, "_param_dict", None) or {}
    resolved = resolve(config, raw.get("hybrid_engine") or {})
    module: nn.Module = engine.module
    causal_model(module)
    source = WeightSource(
        engine,
        layers_per_bucket=resolved.tp_gather_partition_size,
        timeout_s=resolved.sync_timeout_s,
    )
    generation = Generation(module, source, resolved, tokenizer)
    # A backend that isn't there is refused here, before anything has changed.
    generation.ops()
    original_class = type(engine)
    engine.__dict__[STATE] = EngineState(
        original_class=original_class,
        config=resolved,
        generation=generation,
        seeds=_first_seed(),
        policy_version=int(getattr(engine, "global_steps", 0)),
        had_generate=take_over(engine),
    )
    engine.__class__ = type(f"Hybrid{original_class.__name__}", (HybridEngine, original_class), {})
    wrapped: HybridEngine = engine
    return wrapped


def unwrap(engine: Any) -> Any:
    """Undo :func:`wrap` exactly: class, state and the module's generate.

    Returns:
        The same object, a plain DeepSpeed engine again.

    Raises:
        EngineStateError: The engine is not wrapped.
    """
    state = state_of(engine)
    state.require_idle("unwrap")
    give_back(engine, state.had_generate)
    engine.__class__ = state.original_class
    del engine.__dict__[STATE]
    return engine


def _check_engine(engine: Any) -> None:
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise EngineStateError(
            explain(
                "wrap takes a DeepSpeed engine",
                expected="what deepspeed.initialize returned first",
                got=type(engine).__name__,
                hint="Call deepspeed.initialize(model=...) and wrap its engine.",
            )
        )
    if STATE in engine.__dict__:
        raise EngineStateError(
            explain(
                "An engine is wrapped once",
                expected="an engine that is not wrapped yet",
                got="a wrapped one",
                hint="Use it as it is, or unwrap it first.",
            )
        )
    if any(cls.__name__ == "DeepSpeedHybridEngine" for cls in type(engine).__mro__):
        raise EngineStateError(
            explain(
                "wrap is the switch, not hybrid_engine.enabled",
                expected="a plain DeepSpeed engine",
                got="DeepSpeed's own hybrid engine",
                hint='Remove "enabled": true from the hybrid_engine block.',
            )
        )


def _first_seed() -> int:
    """Start of the private seed counter: rank 0's initial seed, on every rank."""
    seed = torch.initial_seed() & (2**62 - 1)
    if world_size() > 1:
        shared = [seed]
        dist.broadcast_object_list(shared, src=0)
        seed = shared[0]
    return seed
