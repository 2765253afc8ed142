"""HF's own results on the probe's prompts, which ours are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tritonhybrid.containers.parts import ModelParts, cache_name
from tritonhybrid.kv_cache import LayerGeometry

PROMPT_LENGTHS = (7, 4)


@dataclass
class Reference:
    """HF's own results on the probe's prompts, packed."""

    tokens: list[tuple[int, ...]]
    layer_inputs: list[torch.Tensor] = field(default_factory=list)
    layer_outputs: list[torch.Tensor] = field(default_factory=list)
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    geometry: list[LayerGeometry] = field(default_factory=list)
    returns_tuple: bool = False


def run_reference(parts: ModelParts) -> Reference:
    """Each prompt alone through HF's own forward, every layer's input and output kept."""
    usable = [t for t in range(parts.vocab_size) if t not in _special_tokens(parts)][:64]
    if not usable:
        raise ValueError("every token of the vocabulary is special")
    tokens = [
        tuple(usable[(7 * i + 3 * row + 1) % len(usable)] for i in range(length))
        for row, length in enumerate(PROMPT_LENGTHS)
    ]
    reference = Reference(tokens)
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in parts.layers]

    def record(index: int) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> None:
            reference.returns_tuple = isinstance(out, tuple)
            inputs = args[0] if args else kwargs["hidden_states"]
            outputs = out[0] if isinstance(out, tuple) else out
            seen[index].append((inputs[0], outputs[0]))

        return hook

    device = parts.device
    handles = []
    hidden, logits = [], []
    try:
        for index, layer in enumerate(parts.layers):
            handles.append(layer.register_forward_hook(record(index), with_kwargs=True))
        for prompt in tokens:
            ids = torch.tensor([prompt], device=device)
            out = parts.backbone(input_ids=ids, use_cache=True)
            hidden.append(out[0][0])
            reference.geometry = _geometry(getattr(out, cache_name(parts.backbone), None))
            logits.append(_full_logits(parts, ids)[:, -1])
    finally:
        for handle in handles:
            handle.remove()
    half = [pairs[::2] for pairs in seen]
    reference.layer_inputs = [torch.cat([x for x, _ in pairs]) for pairs in half]
    reference.layer_outputs = [torch.cat([y for _, y in pairs]) for pairs in half]
    reference.hidden = torch.cat(hidden)
    reference.logits = torch.cat(logits).float()
    if len(reference.geometry) != len(parts.layers):
        raise ValueError(f"{len(reference.geometry)} cache layers for {len(parts.layers)} layers")
    return reference


def _full_logits(parts: ModelParts, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = parts.model(input_ids=ids, use_cache=False).logits
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
