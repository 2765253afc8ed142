"""Which path serves each layer, before and after the probe has had its say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from tritonhybrid.containers.description import LayerDescription, NotDescribableError, describe
from tritonhybrid.containers.experts import GRAPH_LEGAL_EXPERTS, eager_experts_configs
from tritonhybrid.containers.fused import obstacle
from tritonhybrid.containers.parts import ModelParts, causal_model, find_parts
from tritonhybrid.containers.rope import long_rope, rope_types

Path = Literal["fused", "generic", "hf"]


@dataclass(frozen=True)
class LayerPlan:
    """How one decoder layer is served, and why.

    Args:
        layer: Index of the layer.
        path: "fused", "generic" or "hf".
        reason: In words.
        description: What the fused container executes; None elsewhere.
        experts: HF's experts implementation in place of the eager one; None leaves what is set.
    """

    layer: int
    path: Path
    reason: str
    description: LayerDescription | None = None
    experts: str | None = None

    def demoted(self, path: Path, reason: str) -> LayerPlan:
        """The same layer on a slower path."""
        return replace(self, path=path, reason=reason, description=None)


def plan_layers(parts: ModelParts) -> list[LayerPlan]:
    """Choose fused or generic for each layer from its structure alone."""
    plans = [_plan_layer(index, layer) for index, layer in enumerate(parts.layers)]
    if parts.rotary is not None:
        return plans
    reason = "the model has no rotary module that its layers share"
    return [plan.demoted("generic", reason) if plan.path == "fused" else plan for plan in plans]


def describe_model(model: nn.Module) -> list[LayerPlan]:
    """Say how each layer of a model would be served, short of the bind-time probe.

    Args:
        model: A Hugging Face causal language model, parameters not needed.

    Returns:
        One plan a layer; a single one for layer 0 when HF's loop serves the model.

    Raises:
        UnsupportedModelError: The model can't generate.
    """
    causal_model(model)
    parts = find_parts(model)
    if parts is None:
        return [LayerPlan(0, "hf", "the model is not built around a list of decoder layers")]
    reason = unsuited(parts, None)
    if reason is not None:
        return [LayerPlan(index, "hf", reason) for index in range(len(parts.layers))]
    return plan_layers(parts)


def unsuited(parts: ModelParts, max_length: int | None, shortest: int | None = None) -> str | None:
    """Why a model must go to HF's loop, or None.

    Args:
        parts: The model.
        max_length: Longest sequence of the call; None asks for the model as such.
        shortest: Length of the shortest prompt, where HF would pad the prompts to one batch.
    """
    if "dynamic" in rope_types(parts):
        return "dynamic NTK rope changes with the batch's longest sequence"
    if max_length is not None:
        try:
            rope = long_rope(parts, max_length)
        except NotDescribableError as error:
            return f"longrope changes its table, and {error}"
        if rope is not None and shortest is not None and shortest <= rope.original:
            return "longrope's table follows the longest row of a padded batch"
    if getattr(parts.outer, "active_peft_config", None) is not None and getattr(
        parts.outer.active_peft_config, "is_prompt_learning", False
    ):
        return "PEFT prompt learning puts virtual tokens before the prompt"
    adapters = getattr(parts.outer, "peft_config", None) or {}
    if any(getattr(each, "alora_invocation_tokens", None) for each in adapters.values()):
        return "aLoRA adapters begin at their invocation tokens"
    return None


def fingerprint(parts: ModelParts, plans: list[LayerPlan]) -> Hashable:
    """Changes whenever the probe's verdict might."""
    modules = tuple(
        (type(m), *m._forward_pre_hooks, *m._forward_hooks, id(m.__dict__.get("forward")))
        for m in parts.outer.modules()
    )
    return modules, tuple(plans), parts.model.dtype


def count_paths(plans: list[LayerPlan]) -> dict[str, int]:
    """Layers by path and reason, for stats."""
    return dict(Counter(f"{plan.path}: {plan.reason}" for plan in plans))


def _plan_layer(index: int, layer: nn.Module) -> LayerPlan:
    try:
        description = describe(layer)
        reason = obstacle(layer, description)
    except (NotDescribableError, AttributeError, TypeError) as error:
        reason = f"{type(layer).__name__}: {error}"
    if reason is None:
        return LayerPlan(index, "fused", f"{type(layer).__name__} is described", description)
    if not eager_experts_configs(layer):
        return LayerPlan(index, "generic", reason)
    reason = f"{reason}; experts by {GRAPH_LEGAL_EXPERTS}, not eager"
    return LayerPlan(index, "generic", reason, experts=GRAPH_LEGAL_EXPERTS)
