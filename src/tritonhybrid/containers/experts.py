"""HF's mixture-of-experts modules, run so that a decode step never looks at the host."""

from __future__ import annotations

from typing import Any

from torch import nn

# HF's own, in its experts interface: expert bounds stay on the device, weights where they are.
GRAPH_LEGAL_EXPERTS = "grouped_mm"


def eager_experts_configs(layer: nn.Module) -> list[Any]:
    """Configs by which experts of a layer loop over those that were hit, which the host must know.

    Only of experts that read their implementation from there, as HF's interface has it.
    """
    found: dict[int, Any] = {}
    for module in layer.modules():
        config: Any = getattr(module, "config", None)
        # What HF's use_experts_implementation leaves on the modules it dispatches.
        is_dispatched = all(hasattr(module, name) for name in ("has_gate", "is_transposed"))
        if is_dispatched and getattr(config, "_experts_implementation", None) == "eager":
            found[id(config)] = config
    return list(found.values())
