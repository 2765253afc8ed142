"""What a decoder layer and a head compute, said declaratively, and who says it.

A policy is registered under the qualified class name of a decoder layer, so that
no modelling file is imported before its model is. A layer without a policy is
described from its own structure. Whoever says it, the bind-time probe checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import nn

from tritonhybrid.containers.norm import norm_eps
from tritonhybrid.containers.parts import ModelParts, qualified_name
from tritonhybrid.errors import ConfigError, explain

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """A pre-norm decoder layer with RMS norms, rotary GQA attention and a gated MLP.

    ``x += o(attention(rope(qk_norm(qkv(norm(x))))))``, then
    ``x += down(act(gate(norm(x))) * up(norm(x)))``.

    Args:
        num_heads: Query heads (H).
        num_kv_heads: Key and value heads (K).
        head_dim: Width of a head (E).
        scale: Factor on the attention scores.
        norm_eps: Epsilon of both norms.
        norm_weight_offset: Added to the norms' weights (1 in Gemma).
        qk_norm_eps: Epsilon of the per-head norms of q and k; None without them.
        window: Sliding window in tokens; None sees everything.
        activation: "silu", "gelu" or "gelu_tanh".
        input_norm: Path of a submodule inside the layer, as are all that follow.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    norm_eps: float
    norm_weight_offset: float = 0.0
    qk_norm_eps: float | None = None
    window: int | None = None
    activation: str = "silu"
    input_norm: str = "input_layernorm"
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    post_attention_norm: str = "post_attention_layernorm"
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"

    @property
    def norms(self) -> tuple[tuple[str, float, float], ...]:
        """Path, epsilon and weight offset of every norm whose weight is read raw."""
        norms = [
            (path, self.norm_eps, self.norm_weight_offset)
            for path in (self.input_norm, self.post_attention_norm)
        ]
        if self.qk_norm_eps is not None:
            norms += [(path, self.qk_norm_eps, 0.0) for path in (self.q_norm, self.k_norm)]
        return tuple(norms)


@dataclass(frozen=True, kw_only=True)
class HeadDescription:
    """Logits of final hidden states: ``cap(scale * (W x + b))``.

    ``cap(z) = softcap * tanh(z / softcap)``. Weight and bias are the projection's own.

    Args:
        scale: Factor on the projection.
        divisor: Its reciprocal, where HF divides instead, which rounds differently.
        softcap: Cap of the logits; None without one.
    """

    scale: float = 1.0
    divisor: float | None = None
    softcap: float | None = None


class NotDescribableError(Exception):
    """The layer's structure is not one the fused container executes; says why."""


Policy = Callable[[nn.Module], LayerDescription]

_POLICIES: dict[str, Policy] = {}

_LAYER_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_CHILDREN = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_CHILDREN = {"gate_proj", "up_proj", "down_proj"}


def register_policy(layer_class: str, policy: Policy) -> None:
    """Say how a family's decoder layer is described.

    Args:
        layer_class: Qualified class name,
            ``"transformers.models.llama.modeling_llama.LlamaDecoderLayer"``.
        policy: Takes the layer, returns its description, or raises
            NotDescribableError with the reason.

    Raises:
        ConfigError: The class has a policy already.
    """
    if layer_class in _POLICIES:
        raise ConfigError(
            explain(
                "A decoder layer class has one policy",
                expected="a class without a policy",
                got=layer_class,
                hint="Remove one of the two registrations.",
            )
        )
    _POLICIES[layer_class] = policy


def registered_policies() -> dict[str, Policy]:
    """The policies by qualified class name."""
    return dict(_POLICIES)


def describe(layer: nn.Module) -> LayerDescription:
    """Describe a layer by its policy, else by its structure.

    Raises:
        NotDescribableError: Neither applies.
    """
    return _POLICIES.get(qualified_name(layer), describe_from_structure)(layer)


def describe_head(parts: ModelParts) -> HeadDescription:
    """Describe a model's head by what its config calls it; the probe checks it."""
    config: Any = parts.config
    divisor = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1 / divisor if divisor else 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadDescription(
        scale=float(scale),
        divisor=float(divisor) if divisor else None,
        softcap=float(softcap) if softcap else None,
    )


def describe_from_structure(layer: nn.Module) -> LayerDescription:
    """Describe a layer that is built like Llama's, from its own submodules.

    Raises:
        NotDescribableError: A submodule is missing or is one too many.
    """
    _require_children(layer, "layer", _LAYER_CHILDREN, set())
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    _require_children(attention, "self_attn", _ATTENTION_CHILDREN, {"q_norm", "k_norm"})
    _require_children(mlp, "mlp", _MLP_CHILDREN, {"act_fn"})
    config = getattr(attention, "config", None)
    for owner in (layer, attention):
        if any(not name.startswith("_") for name, _ in owner.named_parameters(recurse=False)):
            raise NotDescribableError("the layer has parameters outside its submodules")
    activation = ACTIVATIONS.get(getattr(config, "hidden_act", ""))
    if activation is None:
        raise NotDescribableError(f"activation {getattr(config, 'hidden_act', None)!r}")
    head_dim = int(attention.head_dim)
    has_qk_norm = hasattr(attention, "q_norm")
    # Families with layers of both kinds keep it on the module, the others read the config.
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return LayerDescription(
        num_heads=attention.q_proj.out_features // head_dim,
        num_kv_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        scale=float(attention.scaling),
        norm_eps=_norm_eps(layer, "input_layernorm"),
        qk_norm_eps=_norm_eps(attention, "q_norm") if has_qk_norm else None,
        window=int(window) if window is not None else None,
        activation=activation,
    )


def _norm_eps(owner: nn.Module, path: str) -> float:
    norm = attrgetter(path)(owner)
    eps = norm_eps(norm)
    if eps is None:
        raise NotDescribableError(f"{path} is a {type(norm).__name__}, not an RMS norm")
    return eps


def _require_children(module: nn.Module, name: str, required: set[str], optional: set[str]) -> None:
    found = {child for child, _ in module.named_children()}
    if not required <= found or found - required - optional:
        raise NotDescribableError(f"{name} has submodules {sorted(found)}")


def _describe_gemma(layer: nn.Module) -> LayerDescription:
    """Gemma's norms multiply by one plus their weight."""
    return replace(describe_from_structure(layer), norm_weight_offset=1.0)


for _family, _name, _policy in (
    ("gemma", "Gemma", _describe_gemma),
    ("llama", "Llama", describe_from_structure),
    ("mistral", "Mistral", describe_from_structure),
    ("qwen2", "Qwen2", describe_from_structure),
    ("qwen3", "Qwen3", describe_from_structure),
):
    register_policy(
        f"transformers.models.{_family}.modeling_{_family}.{_name}DecoderLayer", _policy
    )
