"""DeepSpeed compatibility: the methods of its hybrid engine, with their meaning here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tritonhybrid.containers.description import registered_policies
from tritonhybrid.containers.parts import find_parts
from tritonhybrid.containers.plan import LayerPlan, describe_model
from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.weights.hooks import deepspeed_hooks_aside

if TYPE_CHECKING:
    from tritonhybrid.engine_state import EngineState


class SeedSurface:
    """Methods of ``DeepSpeedHybridEngine`` that code in the field calls.

    Containers are described here and bound anew in each rollout, so most of these
    report or prepare; none changes the training module.
    """

    module: nn.Module
    _tritonhybrid: EngineState

    def populate_all_inference_policies(self) -> dict[str, Any]:
        """Policies by qualified class name of the decoder layer."""
        return registered_policies()

    def create_inference_module(self) -> list[LayerPlan]:
        """Plan every layer of the model: fused, generic or HF's loop, with reasons."""
        return self.create_inference_containers(self.module)

    def create_inference_containers(self, module: nn.Module, layer_id: int = 0) -> list[LayerPlan]:
        """Plan the layers of ``module``, numbered from ``layer_id``."""
        # As a rollout meets it: ZeRO-3's own hooks would send every layer to generic.
        with deepspeed_hooks_aside(module):
            plans = describe_model(module)
        return [
            LayerPlan(plan.layer + layer_id, plan.path, plan.reason, plan.description)
            for plan in plans
        ]

    def new_inference_container(
        self, orig_layer: nn.Module, policy_cls: Any, layer_id: int
    ) -> LayerPlan:
        """Plan one layer by a policy (a callable from layer to LayerDescription)."""
        return LayerPlan(layer_id, "fused", "described by the given policy", policy_cls(orig_layer))

    def convert_to_linear_transposed(self, model: nn.Module) -> None:
        """Nothing to convert: the kernels read ``[out, in]`` weights as they are."""

    def retake_inference_cache(self) -> None:
        """Nothing to retake: a call makes the cache it needs."""

    def release_inference_cache(self) -> None:
        """Give the key-value cache and the ZeRO-3 arena back now."""
        self._tritonhybrid.generation.release()

    def prepare_shared_prefill(
        self, source_batch_size: int, repeats: int, prompt_length: int
    ) -> None:
        """Nothing to prepare: samples of one prompt share its pages by themselves.

        Raises:
            ConfigError: A size is below 1.
        """
        for name, value in (
            ("source_batch_size", source_batch_size),
            ("repeats", repeats),
            ("prompt_length", prompt_length),
        ):
            if value < 1:
                raise ConfigError(
                    explain(
                        f"prepare_shared_prefill: {name} is out of range",
                        expected=">= 1",
                        got=value,
                        hint="Pass the batch that will be generated.",
                    )
                )

    def repeat_shared_prefill_cache(self, source_batch_size: int, repeats: int) -> tuple[()]:
        """No copies to return: pages are shared and copied on the first write."""
        return ()

    def fuse_lora_weight(self) -> None:
        """Merge LoRA into the weights: not available in this version.

        Raises:
            ConfigError: The model has adapters. (They run unmerged: right tokens.)
        """
        if _has_adapters(self.module):
            raise ConfigError(
                explain(
                    "LoRA fusing is not available in this version",
                    expected="adapters that run unmerged",
                    got="fuse_lora_weight() on a model with adapters",
                    hint="Leave the call out: generation already applies the adapters.",
                )
            )

    def unfuse_lora_weight(self) -> None:
        """Nothing is ever fused, so there is nothing to undo."""

    def unfuse_lora_weight_non_pinned(self) -> None:
        """Nothing is ever fused, so there is nothing to undo."""

    def _zero3_forward(self, layer_id: int) -> Any:
        """A forward of one layer that gathers its ZeRO-3 parameters around the call.

        Returns:
            A callable with the layer's own forward signature.

        Raises:
            ConfigError: There is no such layer.
        """
        parts = find_parts(self.module)
        count = len(parts.layers) if parts is not None else 0
        if parts is None or not 0 <= layer_id < count:
            raise ConfigError(
                explain(
                    "_zero3_forward takes the index of a decoder layer",
                    expected=f"0 to {count - 1}",
                    got=layer_id,
                    hint="Pass an index within the model.",
                )
            )
        return self._tritonhybrid.generation.source.gathered_forward(parts.layers[layer_id])


def _has_adapters(module: nn.Module) -> bool:
    return any(
        hasattr(submodule, "lora_A") or hasattr(submodule, "lora_right_weight")
        for submodule in module.modules()
    )
