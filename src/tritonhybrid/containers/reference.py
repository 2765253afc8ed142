"""HF's own results on the probe's prompts, which ours are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tritonhybrid.containers.parts import ModelParts, cache_name
from tritonhybrid.kv_cache import LayerGeometry

PROMPT_LENGTHS = (7, 4)

# Logits that any cap worth its name cuts.
_HIGH_LOGIT = 100.0


@dataclass(frozen=True)
class Reference:
    """HF's own results, packed.

    Args:
        tokens: The prompts.
        layer_inputs: [T, D] a layer.
        layer_outputs: [T, D] a layer.
        hidden: [T, D] after the final norm.
        logits: [B, V] float32, of each prompt's last token.
        head_inputs: [2 B, D] hidden states of the last tokens, and the same enlarged.
        head_logits: [2 B, V] float32, what the model makes of them.
        geometry: What each layer caches.
        returns_tuple: Whether the layers return tuples.
    """

    tokens: list[tuple[int, ...]]
    layer_inputs: list[torch.Tensor]
    layer_outputs: list[torch.Tensor]
    hidden: torch.Tensor
    logits: torch.Tensor
    head_inputs: torch.Tensor
    head_logits: torch.Tensor
    geometry: list[LayerGeometry]
    returns_tuple: bool


@dataclass(frozen=True)
class LayerRun:
    """One call of a decoder layer: [T, D] in and out."""

    input: torch.Tensor
    output: torch.Tensor
    returns_tuple: bool


def run_reference(parts: ModelParts) -> Reference:
    """Each prompt alone through HF's own forward, every layer's input and output kept.

    Raises:
        ValueError: The results are not those of one decoder over one sequence.
    """
    tokens = _prompts(parts)
    with recorded(parts.layers) as runs:
        outs = [_backbone(parts, prompt) for prompt in tokens]
    hidden = [out[0][0] for out in outs]
    geometry = _geometry(getattr(outs[-1], cache_name(parts.backbone), None))
    if len(geometry) != len(parts.layers):
        raise ValueError(f"{len(geometry)} cache layers for {len(parts.layers)} layers")
    logits = torch.cat([_logits(parts, prompt)[-1:] for prompt in tokens])
    last = torch.stack([rows[-1] for rows in hidden])
    peak = float(logits.abs().max())
    head_inputs = torch.cat([last, last * max(1.0, _HIGH_LOGIT / max(peak, 1e-2))])
    return Reference(
        tokens=tokens,
        layer_inputs=[torch.cat([run.input for run in own]) for own in runs],
        layer_outputs=[torch.cat([run.output for run in own]) for own in runs],
        hidden=torch.cat(hidden),
        logits=logits,
        head_inputs=head_inputs,
        head_logits=_logits_of(parts, head_inputs, tokens[0]),
        geometry=geometry,
        returns_tuple=runs[-1][-1].returns_tuple,
    )


def layer_inputs(parts: ModelParts, reference: Reference) -> list[torch.Tensor]:
    """Run HF's layers again on the reference's prompts: [T, D] into each."""
    with recorded(parts.layers) as runs:
        for prompt in reference.tokens:
            _backbone(parts, prompt)
    return [torch.cat([run.input for run in own]) for own in runs]


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[list[list[LayerRun]]]:
    """Record every call of each layer."""
    runs: list[list[LayerRun]] = [[] for _ in layers]

    def record(own: list[LayerRun]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            is_tuple = isinstance(out, tuple)
            x = args[0] if args else kwargs["hidden_states"]
            own.append(LayerRun(x[0], (out[0] if is_tuple else out)[0], is_tuple))

        return hook

    handles = []
    try:
        for own, layer in zip(runs, layers, strict=True):
            handles.append(layer.register_forward_hook(record(own), with_kwargs=True))
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def _prompts(parts: ModelParts) -> list[tuple[int, ...]]:
    usable = [t for t in range(parts.vocab_size) if t not in _special_tokens(parts)][:64]
    if not usable:
        raise ValueError("every token of the vocabulary is special")
    return [
        tuple(usable[(7 * i + 3 * row + 1) % len(usable)] for i in range(length))
        for row, length in enumerate(PROMPT_LENGTHS)
    ]


def _backbone(parts: ModelParts, prompt: tuple[int, ...]) -> Any:
    return parts.backbone(input_ids=torch.tensor([prompt], device=parts.device), use_cache=True)


def _logits(parts: ModelParts, prompt: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor([prompt], device=parts.device)
    logits: torch.Tensor = parts.model(input_ids=ids, use_cache=False).logits
    return logits[0].float()


def _logits_of(parts: ModelParts, hidden: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    """What the model's own forward makes of given hidden states: [R, D] to [R, V] float32."""
    given = []

    def give(module: nn.Module, args: Any, out: Any) -> Any:
        given.append(module)
        if isinstance(out, tuple):
            return (hidden.unsqueeze(0), *out[1:])
        out.last_hidden_state = hidden.unsqueeze(0)
        return out

    def give_head(module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        return (hidden.unsqueeze(0), *args[1:])

    prompt = tokens[: len(hidden)]
    # Last of its hooks, so that a user's own have had their effect on what is replaced.
    handle = parts.backbone.register_forward_hook(give)
    try:
        logits = _logits(parts, prompt)
    finally:
        handle.remove()
    if not given:
        # OPT's model calls a part of the backbone; what it does before the head stays unseen here.
        handle = parts.head.register_forward_pre_hook(give_head, prepend=True)
        try:
            logits = _logits(parts, prompt)
        finally:
            handle.remove()
    if len(logits) != len(hidden):
        raise ValueError(f"{len(logits)} rows of logits for {len(hidden)} of hidden states")
    return logits


def _geometry(cache: Any) -> list[LayerGeometry]:
    if cache is None:
        raise ValueError("it returns no key-value cache")
    return [
        LayerGeometry(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])
        for layer in cache.layers
    ]


def _special_tokens(parts: ModelParts) -> set[int]:
    """Tokens that a model may treat apart (padding has a zero embedding)."""
    special: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value: Any = getattr(parts.config, name, None)
        special |= set(value) if isinstance(value, list) else {value} - {None}
    return special
