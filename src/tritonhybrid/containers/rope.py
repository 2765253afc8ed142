"""Rope tables as the model's own rotary module makes them, and the models that have two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from tritonhybrid.containers.description import NotDescribableError
from tritonhybrid.containers.parts import ModelParts, cache_name
from tritonhybrid.containers.patches import Patches
from tritonhybrid.containers.projection import is_plain
from tritonhybrid.interrupts import InterruptsHeld
from tritonhybrid.long_rope import LongRope

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines ``[P, R]``, of position p in row p; with longrope see LongRope."""

    cos: torch.Tensor
    sin: torch.Tensor


def rope_table(
    rotary: nn.Module,
    max_length: int,
    long_rope: LongRope | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> RopeTable:
    """Ask a rotary module for every position at once, and leave it as it was.

    Args:
        rotary: The model's.
        max_length: Positions, more than the short table has where there are two.
        long_rope: The rule of a model with two tables.
        dtype: Of the hidden states.
        device: Of the positions.
    """
    x = torch.empty(1, 1, 1, dtype=dtype, device=device)
    lengths = [max_length] if long_rope is None else [long_rope.original, max_length]
    with _as_it_was(rotary):
        halves = [
            rotary(x, position_ids=torch.arange(length, device=device).unsqueeze(0))
            for length in lengths
        ]
    cos, sin = (torch.cat([half[0] for half in pair]) for pair in zip(*halves, strict=True))
    return RopeTable(cos, sin)


def rope_types(parts: ModelParts) -> set[str]:
    """Every kind of rope in the model's config, of single layer types too."""
    return _rope_types(getattr(parts.config, "rope_parameters", None))


def long_rope(parts: ModelParts, max_length: int) -> LongRope | None:
    """The rule by which sequences of a call change rope tables; None where none does.

    Asks the model's own code, so that the rule is the one its generate follows.

    Args:
        parts: The model.
        max_length: Longest sequence of the call.

    Raises:
        NotDescribableError: One may change, and in another way than :class:`LongRope` says.
    """
    if "longrope" not in rope_types(parts):
        return None
    original = parts.config.rope_parameters.get(_ORIGINAL)
    if isinstance(original, int) and max_length <= original:
        return None
    rotary: Any = parts.rotary
    rotating = [m for m in parts.backbone.modules() if getattr(m, "rope_type", None) == "longrope"]
    if rotary is None or rotating != [rotary]:
        raise NotDescribableError("its layers don't share one rotary module")
    if rotary.config is not parts.config:
        raise NotDescribableError("its rotary module has a config of its own")
    if not is_plain(rotary):
        raise NotDescribableError("its rotary module has a hook or a forward of its own")
    if not isinstance(original, int):
        raise NotDescribableError(f"its config has no {_ORIGINAL}")
    around = [_starts_anew(parts, original + step) for step in (0, 1, 2)]
    if around not in ([False, False, False], [False, True, False]):
        raise NotDescribableError("its generate drops its cache by a rule of its own")
    return LongRope(original=original, starts_anew=around[1])


@contextmanager
def short_original(parts: ModelParts, length: int) -> Iterator[None]:
    """A model with longrope whose short table is for ``length`` positions."""
    config = parts.config
    patches = Patches()
    assert parts.rotary is not None
    with _as_it_was(parts.rotary):
        try:
            patches.set(config, "rope_parameters", {**config.rope_parameters, _ORIGINAL: length})
            if hasattr(config, _ORIGINAL):
                patches.set(config, _ORIGINAL, length)
            yield
        finally:
            patches.undo()


def _starts_anew(parts: ModelParts, length: int) -> bool:
    """Whether the model's generate drops its cache to run the ``length``-th token."""
    model: Any = parts.model
    name = cache_name(model)
    ids = torch.zeros(1, length, dtype=torch.int64, device=parts.device)
    try:
        inputs = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=1,
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            **{name: _Past(parts.config, length - 1)},
        )
        num_inputs = inputs["input_ids"].shape[1]
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise NotDescribableError(
            f"its generate can't be asked about its cache ({error})"
        ) from error
    is_dropped = inputs.get(name) is None
    if num_inputs != (length if is_dropped else 1):
        raise NotDescribableError(f"its generate drops its cache and runs {num_inputs} tokens")
    return is_dropped


class _Past(DynamicCache):
    """A cache that says it holds so many tokens."""

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config=config)
        self._length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length


@contextmanager
def _as_it_was(rotary: nn.Module) -> Iterator[None]:
    """Put back what a rotary module keeps of its last call: frequencies, and where."""
    attributes, buffers = dict(rotary.__dict__), dict(rotary._buffers)
    held = [(t, t.clone()) for t in (*attributes.values(), *buffers.values()) if torch.is_tensor(t)]
    try:
        yield
    finally:
        with InterruptsHeld():
            for tensor, values in held:
                tensor.copy_(values)
            for now, before in ((rotary._buffers, buffers), (rotary.__dict__, attributes)):
                for name in now.keys() - before.keys():
                    del now[name]
                now.update(before)


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    kinds = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    for value in parameters.values():
        kinds |= _rope_types(value)
    return kinds
