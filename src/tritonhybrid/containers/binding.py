"""The model with its containers bound, for one materialisation of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, cast

import torch

from tritonhybrid.batch import Batch
from tritonhybrid.containers.description import describe_head
from tritonhybrid.containers.experts import eager_experts_configs
from tritonhybrid.containers.fused import FusedLayer
from tritonhybrid.containers.generic import ATTENTION_NAME, STEP_ATTRIBUTE, PagedStep
from tritonhybrid.containers.head import Head
from tritonhybrid.containers.norm import is_rms_norm, norm_eps
from tritonhybrid.containers.parts import ModelParts, cache_name, configs
from tritonhybrid.containers.patches import Patches
from tritonhybrid.containers.plan import LayerPlan
from tritonhybrid.containers.projection import has_hooks, is_plain
from tritonhybrid.containers.rope import RopeTable, rope_table
from tritonhybrid.decode_graphs import FixedTensors
from tritonhybrid.kv_cache import PagedKVCache
from tritonhybrid.long_rope import LongRope
from tritonhybrid_kernels.ops import Ops


class Binding:
    """Runs HF's decoder with our containers in its layers' places.

    A context manager: patches exist inside it only. Weights are read at entry, so
    they must be whole by then and until exit.

    Args:
        parts: The model.
        plans: Fused or generic, a layer each.
        ops: The operations to call.
        cache: Keys and values.
        max_length: Longest sequence; sizes the rope table.
        long_rope: The rule by which sequences change rope tables, if any grows so long.
        returns_tuple: Whether HF's layers return tuples.
        fixed: Where the rope tables of calls that follow one another stay, if they must.
    """

    def __init__(
        self,
        parts: ModelParts,
        plans: Sequence[LayerPlan],
        ops: Ops,
        cache: PagedKVCache,
        *,
        max_length: int,
        long_rope: LongRope | None = None,
        returns_tuple: bool = False,
        fixed: FixedTensors | None = None,
    ) -> None:
        self.parts = parts
        self.plans = tuple(plans)
        self.step = PagedStep(cache, ops)
        self.head = Head(parts.head, describe_head(parts), ops)
        self._ops = ops
        self._cache = cache
        self._max_length = max_length
        self.long_rope = long_rope
        self._fixed = fixed
        self._returns_tuple = returns_tuple
        self._cache_name = cache_name(parts.backbone)
        self._patches = Patches()

    @property
    def is_fused(self) -> bool:
        """Whether every layer runs in our container."""
        return all(plan.path == "fused" for plan in self.plans)

    def __enter__(self) -> Binding:
        """Bind; undone at once if a layer can't be."""
        try:
            rope = self._rope_table()
            self._bind_layers(rope)
            if self.is_fused:
                self._bind_surroundings()
            elif self.long_rope is not None:
                self._bind_rotary(rope)
            if any(plan.path == "generic" for plan in self.plans):
                self._bind_attention()
                self._bind_experts()
        except BaseException:
            self._patches.undo()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release: the module is HF's again."""
        self._patches.undo()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm, keys and values written.

        Args:
            batch: The step.

        Returns:
            [T, D].
        """
        self.step.begin(batch)
        try:
            out = self.parts.backbone(
                input_ids=batch.input_ids.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=True,
                **{self._cache_name: self.step},
            )
        finally:
            self.step.batch = None
        hidden: torch.Tensor = out[0]
        return hidden.squeeze(0)

    def container(self, index: int) -> Callable[[torch.Tensor, Batch], torch.Tensor]:
        """The container bound in layer ``index`` (which is planned fused)."""
        return self._containers[index]

    def graph_obstacle(self) -> str | None:
        """Why a decode step may not be captured and replayed, or None if it may.

        Python runs at the capture only. So all that a step computes must be ours or come from
        addresses: whatever another module of Python decides would stay as it was then.
        """
        if not self.is_fused:
            count = sum(plan.path != "fused" for plan in self.plans)
            return f"{count} layers run in HF's own code"
        for name, module in self.parts.model.named_modules():
            if has_hooks(module):
                return f"a replay would pass over the hook on {name or 'the model'}"
        for index, container in self._containers.items():
            for projection in container.projections:
                if not projection.is_raw:
                    return f"layer {index} calls a {type(projection.module).__name__}"
        if not self.head.projection.is_raw:
            return f"the head is a {type(self.head.projection.module).__name__}"
        for module in (self.parts.backbone, self.parts.model.get_input_embeddings()):
            package = type(module).__module__.partition(".")[0]
            if package not in ("torch", "transformers") or not is_plain(module):
                return f"{type(module).__name__} has code of its own"
        return None

    def _bind_layers(self, rope: RopeTable | None) -> None:
        self._containers: dict[int, FusedLayer] = {}
        for plan, layer in zip(self.plans, self.parts.layers, strict=True):
            if plan.description is None:
                continue
            assert rope is not None, "a described layer rotates by the model's rotary module"
            container = FusedLayer(
                layer, plan.description, plan.layer, self._ops, self._cache, rope
            )
            self._containers[plan.layer] = container
            self._patches.set(layer, "forward", self._layer_forward(container))

    def _layer_forward(self, container: FusedLayer) -> Callable[..., Any]:
        step = self.step

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = container(hidden_states.squeeze(0), step.current()).unsqueeze(0)
            return (out,) if self._returns_tuple else out

        return forward

    def _bind_surroundings(self) -> None:
        """Final norm in our kernel, if it is one; the rotary module has said all in the tables."""
        norm = self.parts.final_norm
        description = self.plans[0].description
        assert description is not None
        offset = description.norm_weight_offset
        eps = norm_eps(norm) if norm is not None else None
        if norm is not None and eps is not None and is_rms_norm(norm, eps, offset):
            weight = cast("torch.Tensor", norm.weight).detach()
            ops = self._ops

            def norm_forward(x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = ops.add_rms_norm(x.squeeze(0), weight, eps, weight_offset=offset)
                return y.unsqueeze(0)

            self._patches.set(norm, "forward", norm_forward)
        # A hook would be handed the stub's None, so a watched rotary runs as it is.
        if self.parts.rotary is not None and is_plain(self.parts.rotary):
            self._patches.set(self.parts.rotary, "forward", lambda *args, **kwargs: (None, None))

    def _bind_rotary(self, rope: RopeTable | None) -> None:
        """Each token's own row in place of one table for the whole step."""
        assert rope is not None and self.parts.rotary is not None
        step = self.step

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            rows = step.current().rope_rows
            return (
                rope.cos.index_select(0, rows).unsqueeze(0),
                rope.sin.index_select(0, rows).unsqueeze(0),
            )

        self._patches.set(self.parts.rotary, "forward", forward)

    def _bind_attention(self) -> None:
        """Point HF's layers at our attention; it finds the step on its own module."""
        for config in configs(self.parts.model):
            self._patches.set(config, "_attn_implementation_internal", ATTENTION_NAME)
        for plan, layer in zip(self.plans, self.parts.layers, strict=True):
            if plan.path == "generic":
                for module in layer.modules():
                    if isinstance(getattr(module, "layer_idx", None), int):
                        self._patches.set(module, STEP_ATTRIBUTE, self.step)

    def _bind_experts(self) -> None:
        for plan, layer in zip(self.plans, self.parts.layers, strict=True):
            if plan.experts is not None:
                for config in eager_experts_configs(layer):
                    self._patches.set(config, "_experts_implementation_internal", plan.experts)

    def _rope_table(self) -> RopeTable | None:
        """Rows for every position, where our side does the rotating or says how."""
        if self.long_rope is None and all(plan.path == "generic" for plan in self.plans):
            return None
        assert self.parts.rotary is not None
        table = rope_table(
            self.parts.rotary,
            self._max_length,
            self.long_rope,
            dtype=self._cache.keys[0].dtype,
            device=self.parts.device,
        )
        if self._fixed is None:
            return table
        return RopeTable(self._fixed.keep("cos", table.cos), self._fixed.keep("sin", table.sin))
