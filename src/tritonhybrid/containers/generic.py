"""The generic path: HF's own layer code over our attention and our cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tritonhybrid.batch import Batch
from tritonhybrid.containers.fused import attend
from tritonhybrid.errors import EngineStateError, UnsupportedModelError, explain
from tritonhybrid.kv_cache import PagedKVCache
from tritonhybrid_kernels.ops import Ops

ATTENTION_NAME = "tritonhybrid_paged"
# Where an attention module carries the step while it is bound.
STEP_ATTRIBUTE = "paged_step"

# What HF's layers tell the attention function: ours by theirs, and what changes nothing here.
_FEATURES = {"sliding_window": "window", "softcap": "softcap", "s_aux": "sinks"}
_HARMLESS = {
    "cache",
    "cache_position",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_ids",
    "use_cache",
}
# Harmless with this value alone.
_HARMLESS_VALUES = {"is_causal": True, "output_attentions": False}


class PagedStep(Cache):
    """HF's cache interface over the pages, carrying the step's batch to the attention.

    Args:
        cache: Keys and values of all layers.
        ops: The operations to call.
    """

    def __init__(self, cache: PagedKVCache, ops: Ops) -> None:
        super().__init__(layers=[])
        self.pages = cache
        self.ops = ops
        self.batch: Batch | None = None
        self.num_updates = 0
        self.num_attentions = 0

    def begin(self, batch: Batch) -> None:
        """Take the step about to run and count its calls afresh."""
        self.batch = batch
        self.num_updates = 0
        self.num_attentions = 0

    def current(self) -> Batch:
        """The step that runs.

        Raises:
            EngineStateError: None does: the module was called between the steps of a rollout.
        """
        if self.batch is None:
            raise EngineStateError(
                explain(
                    "A module that a rollout has taken over serves no other forward",
                    expected="forwards before or after the rollout",
                    got="one between its steps",
                    hint="Exhaust or close the rollout stream first.",
                )
            )
        return self.batch

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[1, K, T, E]`` keys and values of the step's tokens into their slots."""
        batch = self.current()
        self.num_updates += 1
        for states, pages in (
            (key_states, self.pages.keys[layer_idx]),
            (value_states, self.pages.values[layer_idx]),
        ):
            rows = pages.view(-1, *pages.shape[2:])
            rows.index_copy_(0, batch.slot_mapping, states[0].transpose(0, 1))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No length: every token brings its own position."""
        return 0


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as HF's interface calls it, over the pages of the layer.

    Args:
        module: The attention module; its ``layer_idx`` names the pages.
        query: [1, H, T, E].
        key: Already in the pages; not read.
        value: Already in the pages; not read.
        attention_mask: None: no mask function is registered for this attention.
        scaling: Factor on the scores; None is E ** -0.5.
        dropout: Ignored: generation has none.
        kwargs: Window, softcap and sinks of the layer, and what changes nothing.

    Returns:
        [1, T, H, E'], and None for the weights.

    Raises:
        UnsupportedModelError: The layer makes a mask or asks for what is not known here; the
            probe demotes its model.
    """
    step: PagedStep = module.__dict__[STEP_ATTRIBUTE]
    batch = step.current()
    if attention_mask is not None:
        # A model that adds to the mask itself (sparse indexers do); the probe demotes it.
        raise _refusal(module, "takes no mask", "none", "one of its own making")
    step.num_attentions += 1
    index: int = module.layer_idx  # type: ignore[assignment]
    features = _features(module, kwargs)
    q = query[0].transpose(0, 1).contiguous()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    keys, values = step.pages.keys[index], step.pages.values[index]
    out = attend(step.ops, q, keys, values, batch, scale=scale, **features)
    return out.unsqueeze(0), None


def _features(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What attention over pages is to do, of all that a layer says; nothing is passed over."""
    features = {}
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS:
            continue
        if name in _FEATURES:
            features[_FEATURES[name]] = value
        elif name not in _HARMLESS_VALUES or value is not _HARMLESS_VALUES[name]:
            known = f"one of {', '.join(_FEATURES)}"
            raise _refusal(module, "does what it knows and no more", known, name)
    return features


def _refusal(module: nn.Module, rule: str, expected: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        explain(
            f"Attention over pages {rule}",
            expected=expected,
            got=f"{got} from {type(module).__name__}",
            hint="HF's own loop serves such a model.",
        )
    )


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
