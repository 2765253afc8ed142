"""Where whole weights come from: resident, pinned (ZeRO-3) or a foreign gather."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from tritonhybrid.interrupts import InterruptsHeld
from tritonhybrid.weights.agreement import RankAgreement
from tritonhybrid.weights.arena import Arena, full_shape
from tritonhybrid.weights.hooks import deepspeed_hooks_aside, eval_mode, plain_linear

Strategy = Literal["resident", "pinned", "foreign"]


@dataclass(frozen=True, kw_only=True)
class Materialisation:
    """What making the weights whole took.

    Args:
        strategy: How.
        gather_s: Seconds.
        gather_bytes: Bytes that came from all-gathers on this rank.
        extra_bytes: Bytes allocated beyond the training copy.
        was_training: Whether a submodule was in training mode.
    """

    strategy: Strategy
    gather_s: float
    gather_bytes: int
    extra_bytes: int
    was_training: bool


class WeightSource:
    """Makes a DeepSpeed engine's parameters whole for a while.

    With ZeRO-3 every rank must enter and leave :meth:`materialised` together; with
    stages 0 to 2 no rank owes the others a call.

    Args:
        engine: The DeepSpeed engine.
        layers_per_bucket: Decoder layers gathered at a time.
        timeout_s: Seconds to wait for other ranks.
    """

    def __init__(self, engine: Any, *, layers_per_bucket: int, timeout_s: float) -> None:
        self._module: nn.Module = engine.module
        self._is_partitioned = engine.zero_optimization_stage() == 3
        self._layers_per_bucket = layers_per_bucket
        self._arena: Arena | None = None
        is_collective = self._is_partitioned and dist.get_world_size() > 1
        self._agreement = RankAgreement(timeout_s) if is_collective else None

    @property
    def strategy(self) -> Strategy:
        """How the next materialisation would go about it."""
        if not self._is_partitioned:
            return "resident"
        own = [p for p in self._module.parameters() if not getattr(p, "ds_persist", False)]
        if own and all(_status(p) is ZeroParamStatus.AVAILABLE for p in own):
            return "foreign"
        return "pinned"

    @property
    def arena_bytes(self) -> int:
        """Bytes the arena holds now."""
        return self._arena.num_bytes if self._arena is not None else 0

    def release(self) -> None:
        """Free the arena; the next materialisation makes a new one."""
        self._arena = None

    @property
    def agreement(self) -> RankAgreement | None:
        """Where ranks meet, when the next materialisation is collective."""
        return self._agreement if self.strategy == "pinned" else None

    @contextmanager
    def materialised(self, layers: Iterable[nn.Module] = ()) -> Iterator[Materialisation]:
        """Whole parameters, eval mode, DeepSpeed's hooks aside; all undone on exit.

        Args:
            layers: Decoder layers, for bucketing.

        Yields:
            What it took.
        """
        strategy = self.strategy
        with (
            deepspeed_hooks_aside(self._module),
            eval_mode(self._module) as was_training,
            plain_linear(),
            torch.no_grad(),
        ):
            if strategy != "pinned":
                yield Materialisation(
                    strategy=strategy,
                    gather_s=0.0,
                    gather_bytes=0,
                    extra_bytes=0,
                    was_training=was_training,
                )
                return
            parameters = list(self._module.parameters())
            partitioned = [(p, p.data) for p in parameters]
            try:
                start = time.perf_counter()
                gathered = self._fill_arena(parameters, layers)
                assert self._arena is not None
                for parameter in parameters:
                    parameter.data = self._arena.view(parameter)
                yield Materialisation(
                    strategy=strategy,
                    gather_s=time.perf_counter() - start,
                    gather_bytes=gathered,
                    extra_bytes=self._arena.num_bytes,
                    was_training=was_training,
                )
            finally:
                with InterruptsHeld():
                    for parameter, data in partitioned:
                        parameter.data = data

    def gathered_forward(self, layer: nn.Module) -> Callable[..., Any]:
        """The layer's forward with its partitioned parameters gathered around each call.

        Every rank must call it together under ZeRO-3.
        """

        def forward(*inputs: Any, **kwargs: Any) -> Any:
            missing = [p for p in layer.parameters() if _status(p) is not ZeroParamStatus.AVAILABLE]
            with GatheredParameters(missing), deepspeed_hooks_aside(layer):
                return layer(*inputs, **kwargs)

        return forward

    def _fill_arena(self, parameters: Sequence[nn.Parameter], layers: Iterable[nn.Module]) -> int:
        if self._arena is None or not self._arena.holds(parameters):
            self._arena = None
            self._arena = Arena(parameters)
        gathered = 0
        for bucket in _buckets(parameters, layers, self._layers_per_bucket):
            # A persistent (small) parameter is whole already and must not be partitioned.
            missing = [p for p in bucket if _status(p) is not ZeroParamStatus.AVAILABLE]
            with GatheredParameters(missing):
                for parameter in bucket:
                    self._arena.view(parameter).copy_(parameter.data)
            gathered += sum(full_shape(p).numel() * p.dtype.itemsize for p in missing)
        return gathered


def _buckets(
    parameters: Sequence[nn.Parameter], layers: Iterable[nn.Module], layers_per_bucket: int
) -> list[list[nn.Parameter]]:
    """Parameters in order: those outside the layers first, then runs of layers."""
    home = {
        id(parameter): 1 + index // layers_per_bucket
        for index, layer in enumerate(layers)
        for parameter in layer.parameters()
    }
    buckets: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        buckets.setdefault(home.get(id(parameter), 0), []).append(parameter)
    return list(buckets.values())


def _status(parameter: nn.Parameter) -> Any:
    return getattr(parameter, "ds_status", ZeroParamStatus.AVAILABLE)
