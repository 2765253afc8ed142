"""Train with DeepSpeed and generate from the same weights, in one process.

``tritonhybrid.wrap(engine)`` gives a DeepSpeed engine serving-class generation.
Names are resolved on first use, so importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritonhybrid import testing, trl
    from tritonhybrid.config import HybridConfig
    from tritonhybrid.containers.description import register_policy
    from tritonhybrid.engine import HybridEngine
    from tritonhybrid.errors import (
        CacheExhaustedError,
        ConfigError,
        EngineStateError,
        KernelArgumentError,
        NonFiniteLogitsError,
        RankFailureError,
        TritonHybridError,
        UnsupportedModelError,
    )
    from tritonhybrid.integrations.deepspeed_rollout import TritonRollout
    from tritonhybrid.rollout_output import Completion, PausedRollout, RolloutOutput
    from tritonhybrid.rollout_stream import RolloutStream
    from tritonhybrid.sampling_params import SamplingParams
    from tritonhybrid.stats import RolloutStats
    from tritonhybrid.wrapping import unwrap, wrap

_HOMES = {
    "CacheExhaustedError": "errors",
    "Completion": "rollout_output",
    "ConfigError": "errors",
    "EngineStateError": "errors",
    "HybridConfig": "config",
    "HybridEngine": "engine",
    "KernelArgumentError": "errors",
    "NonFiniteLogitsError": "errors",
    "PausedRollout": "rollout_output",
    "RankFailureError": "errors",
    "RolloutOutput": "rollout_output",
    "RolloutStats": "stats",
    "RolloutStream": "rollout_stream",
    "SamplingParams": "sampling_params",
    "TritonHybridError": "errors",
    "TritonRollout": "integrations.deepspeed_rollout",
    "UnsupportedModelError": "errors",
    "register_policy": "containers.description",
    "unwrap": "wrapping",
    "wrap": "wrapping",
}
_MODULES = ("testing", "trl")

__all__ = [
    "CacheExhaustedError",
    "Completion",
    "ConfigError",
    "EngineStateError",
    "HybridConfig",
    "HybridEngine",
    "KernelArgumentError",
    "NonFiniteLogitsError",
    "PausedRollout",
    "RankFailureError",
    "RolloutOutput",
    "RolloutStats",
    "RolloutStream",
    "SamplingParams",
    "TritonHybridError",
    "TritonRollout",
    "UnsupportedModelError",
    "register_policy",
    "testing",
    "trl",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import the home of a public name when it is first asked for."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
