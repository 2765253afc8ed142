"""Where whole weights come from: resident, pinned (ZeRO-3) or a foreign gather."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.partition_parameters import (
    DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR,
    ZeroParamStatus,
)
from torch import nn

from tritonhybrid.interrupts import InterruptsHeld
from tritonhybrid.weights.agreement import RankAgreement
from tritonhybrid.weights.arena import Arena, Groups, full_shape
from tritonhybrid.weights.gather_guard import GatherGuard
from tritonhybrid.weights.hooks import deepspeed_hooks_aside, eval_mode, plain_linear

Strategy = Literal["resident", "pinned", "foreign"]


@dataclass(frozen=True, kw_only=True)
class Materialisation:
    """What making the weights whole took.

    Args:
        strategy: How.
        gather_start_s: ``time.perf_counter()`` when gathering began; 0.0 where none was needed.
        gather_s: Seconds.
        gather_bytes: Bytes that came from all-gathers on this rank.
        extra_bytes: Bytes allocated beyond the training copy.
        was_training: Whether a submodule was in training mode.
        autocast_dtype: What the caller's autocast, or DeepSpeed's in training, would cast to;
            None where neither is on.
    """

    strategy: Strategy
    gather_start_s: float
    gather_s: float
    gather_bytes: int
    extra_bytes: int
    was_training: bool
    autocast_dtype: torch.dtype | None


class WeightSource:
    """Makes a DeepSpeed engine's parameters whole for a while.

    With ZeRO-3 every rank must enter and leave :meth:`materialised` together; with
    stages 0 to 2 no rank owes the others a call.

    Args:
        engine: The DeepSpeed engine.
        layers_per_bucket: Decoder layers gathered at a time.
        timeout_s: Seconds to wait for other ranks.

    Attributes:
        is_partitioned: Whether it is ZeRO-3's.
    """

    def __init__(self, engine: Any, *, layers_per_bucket: int, timeout_s: float) -> None:
        self._engine = engine
        self._module: nn.Module = engine.module
        self.is_partitioned = engine.zero_optimization_stage() == 3
        self._layers_per_bucket = layers_per_bucket
        self._arena: Arena | None = None
        is_collective = self.is_partitioned and dist.get_world_size() > 1
        self._agreement = RankAgreement(timeout_s) if is_collective else None

    @property
    def strategy(self) -> Strategy:
        """How the next materialisation would go about it."""
        if not self.is_partitioned:
            return "resident"
        # Not by ds_status: DeepSpeed, too, leaves parameters whole after a forward.
        own = [p for p in self._module.parameters() if not getattr(p, "ds_persist", False)]
        if own and all(getattr(p, DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR, 0) for p in own):
            return "foreign"
        return "pinned"

    def _autocast_dtype(self) -> torch.dtype | None:
        kind = next(self._module.parameters()).device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        is_enabled = getattr(self._engine, "torch_autocast_enabled", None)
        if is_enabled is None or not is_enabled():
            return None
        dtype: torch.dtype = self._engine.torch_autocast_dtype()
        return dtype

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
    def materialised(
        self,
        layers: Iterable[nn.Module] = (),
        groups: Groups = (),
        meet: Callable[[], None] = lambda: None,
    ) -> Iterator[Materialisation]:
        """Whole parameters, eval mode, DeepSpeed's hooks aside; all undone on exit.

        With ZeRO-3 a rank that fails while it gathers goes on taking part and raises when
        all is gathered, so that the ranks stay in step.

        Args:
            layers: Decoder layers, for bucketing.
            groups: Parameters that shall lie side by side where they are laid out anew.
            meet: Called before the first gather and after the last; raises on every rank
                if one of them has failed by then.

        Yields:
            What it took.

        Raises:
            RankFailureError: Another rank failed inside a gather.
            EngineStateError: Some rank did.
        """
        strategy = self.strategy
        autocast_dtype = self._autocast_dtype()
        with (
            deepspeed_hooks_aside(self._module),
            eval_mode(self._module) as was_training,
            plain_linear(),
            # What is kept for the next call must not be an inference tensor of this one.
            torch.inference_mode(False),
            torch.no_grad(),
            # The pages hold keys and values in the weights' dtype.
            torch.autocast(next(self._module.parameters()).device.type, enabled=False),
        ):
            if strategy != "pinned":
                yield Materialisation(
                    strategy=strategy,
                    gather_start_s=0.0,
                    gather_s=0.0,
                    gather_bytes=0,
                    extra_bytes=0,
                    was_training=was_training,
                    autocast_dtype=autocast_dtype,
                )
                return
            parameters = list(self._module.parameters())
            arena = self._arena_of(parameters, groups)
            partitioned = [_Partition(parameter) for parameter in parameters]
            try:
                with InterruptsHeld():
                    meet()
                    start = time.perf_counter()
                    gathered = self._gather(arena, parameters, layers)
                    for parameter in parameters:
                        parameter.data = arena.view(parameter)
                    gather_s = time.perf_counter() - start
                    meet()
                yield Materialisation(
                    strategy=strategy,
                    gather_start_s=start,
                    gather_s=gather_s,
                    gather_bytes=gathered,
                    extra_bytes=arena.num_bytes,
                    was_training=was_training,
                    autocast_dtype=autocast_dtype,
                )
            finally:
                with InterruptsHeld():
                    for partition in partitioned:
                        partition.restore()

    def gathered_forward(self, layer: nn.Module) -> Callable[..., Any]:
        """The layer's forward with its partitioned parameters gathered around each call.

        Every rank must call it together under ZeRO-3.
        """

        def forward(*inputs: Any, **kwargs: Any) -> Any:
            missing = [p for p in layer.parameters() if _status(p) is not ZeroParamStatus.AVAILABLE]
            with GatheredParameters(missing), deepspeed_hooks_aside(layer):
                return layer(*inputs, **kwargs)

        return forward

    def _arena_of(self, parameters: Sequence[nn.Parameter], groups: Groups) -> Arena:
        if self._arena is None or not self._arena.holds(parameters, groups):
            self._arena = None
            self._arena = Arena(parameters, groups)
        return self._arena

    def _gather(
        self, arena: Arena, parameters: Sequence[nn.Parameter], layers: Iterable[nn.Module]
    ) -> int:
        """Copy all parameters into the arena; returns the bytes gathered."""
        guard = GatherGuard(self._agreement, parameters) if self._agreement is not None else None
        collectives = guard.collectives if guard is not None else nullcontext
        failure: BaseException | None = None
        gathered = 0
        with guard.time_limit() if guard is not None else nullcontext():
            for bucket in _buckets(parameters, layers, self._layers_per_bucket):
                # A persistent (small) parameter is whole already and must not be partitioned.
                missing = [p for p in bucket if _status(p) is not ZeroParamStatus.AVAILABLE]
                gather = GatheredParameters(missing)
                with collectives():
                    gather.__enter__()
                try:
                    if failure is None:
                        arena.store(bucket)
                except BaseException as error:
                    # The others gather on; this rank leaves them when all is gathered.
                    failure = error
                with collectives():
                    gather.__exit__(None, None, None)
                gathered += sum(full_shape(p).numel() * p.dtype.itemsize for p in missing)
            if guard is not None:
                with collectives():
                    guard.await_device(parameters[0].device)
        if failure is not None:
            raise failure
        return gathered


class _Partition:
    """A parameter as it is between rollouts, whatever becomes of it meanwhile."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._data = parameter.data
        self._attributes = {
            name: parameter.__dict__[name]
            for name in ("ds_status", DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR)
            if name in parameter.__dict__
        }

    def restore(self) -> None:
        """Put everything back."""
        self._parameter.data = self._data
        self._parameter.__dict__.pop(DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR, None)
        self._parameter.__dict__.update(self._attributes)


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
