"""The parts of a Hugging Face causal language model that a rollout touches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tritonhybrid.errors import UnsupportedModelError, explain


@dataclass(frozen=True)
class ModelParts:
    """Where the skeleton's joints are.

    Args:
        outer: The module DeepSpeed trains (a PEFT wrapper, perhaps).
        model: The ``ForCausalLM`` inside it.
        backbone: Its decoder without the head.
        layers: The decoder layers in order.
        final_norm: The norm after the last layer, if it is a direct child.
        rotary: The model-level rotary embedding, if there is one.
        head: The output projection.
        config: The decoder's own config.
    """

    outer: nn.Module
    model: PreTrainedModel
    backbone: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module | None
    rotary: nn.Module | None
    head: nn.Module
    config: Any

    @property
    def vocab_size(self) -> int:
        """Tokens the model can read."""
        return int(self.config.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the head, and so the sampling, is."""
        weight = self.head.weight
        assert isinstance(weight, torch.Tensor)
        return weight.device


def causal_model(module: nn.Module) -> PreTrainedModel:
    """The ``ForCausalLM`` inside ``module``.

    Raises:
        UnsupportedModelError: It is no Hugging Face model, or one that can't generate.
    """
    wrapper: Any = module
    model = wrapper.get_base_model() if hasattr(module, "get_base_model") else module
    if not isinstance(model, PreTrainedModel):
        raise _unsupported("a transformers PreTrainedModel", type(model).__name__)
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise _unsupported("a decoder-only model with a language modelling head", type(model))
    if model.get_output_embeddings() is None:
        raise _unsupported("a model with output embeddings", type(model).__name__)
    return model


def own_generate(module: nn.Module) -> Callable[..., Any]:
    """The generate of a module's class; a PEFT wrapper without one has its base model's."""
    owner = module if hasattr(type(module), "generate") else causal_model(module)
    bound: Callable[..., Any] = type(owner).generate.__get__(owner)  # type: ignore[attr-defined]
    if "base_model_prepare_inputs_for_generation" not in vars(owner):
        return bound

    def generate(*inputs: Any, **kwargs: Any) -> Any:
        try:
            return bound(*inputs, **kwargs)
        except BaseException:
            # PEFT up to 0.21.2 takes its patch back after an Exception, not after Ctrl-C.
            peft: Any = owner
            own = peft.base_model_prepare_inputs_for_generation
            peft.base_model.prepare_inputs_for_generation = own
            raise

    return generate


def find_parts(module: nn.Module) -> ModelParts | None:
    """Locate the joints; None where the model is not built around a list of layers.

    Raises:
        UnsupportedModelError: See :func:`causal_model`.
    """
    model = causal_model(module)
    config = model.config.get_text_config(decoder=True)
    backbone = model.base_model
    count = getattr(config, "num_hidden_layers", None)
    if backbone is model or not isinstance(count, int):
        return None
    lists = (m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    layers = next(lists, None)
    head = model.get_output_embeddings()
    if layers is None or not isinstance(head, nn.Module):
        return None
    return ModelParts(
        outer=module,
        model=model,
        backbone=backbone,
        layers=layers,
        final_norm=getattr(backbone, "norm", None),
        rotary=getattr(backbone, "rotary_emb", None),
        head=head,
        config=config,
    )


def cache_name(module: nn.Module) -> str:
    """What a module's forward and its output call the key-value cache.

    transformers 5.24 renamed ``past_key_values`` to ``cache`` in its own models; a model's
    remote code may lag behind. A forward that only hands its arguments on says neither.
    """
    for owner in type(module).__mro__:
        forward = vars(owner).get("forward")
        named = signature(forward).parameters if callable(forward) else ()
        for name in ("cache", "past_key_values"):
            if name in named:
                return name
    return "past_key_values"


def configs(model: nn.Module) -> list[Any]:
    """Every configuration that a model's code may read, sub-configurations too."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in list(found.values()):
        for name in getattr(config, "sub_configs", None) or {}:
            child = getattr(config, name, None)
            if child is not None:
                found[id(child)] = child
    return [c for c in found.values() if "_attn_implementation_internal" in c.__dict__]


def qualified_name(module: nn.Module) -> str:
    """Module path and class name, the key of policies."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _unsupported(expected: str, got: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        explain(
            "tritonhybrid serves causal language models",
            expected=expected,
            got=got,
            hint="Wrap the engine of a ForCausalLM model.",
        )
    )
