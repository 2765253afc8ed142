"""The recording backend: what a decode step would ask of a GPU, counted on the CPU.

Every operation runs its torch path, as one opaque launch; what happens between the
launches is watched. A step is fit for a CUDA graph when it reads nothing on the
host, allocates the same sizes and passes the same scalars and the same long-lived
pointers as the step before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tritonhybrid_kernels.ops import OP_NAMES, Ops, select_ops

# Kernels that one call of an operation launches on a GPU; the others launch one.
_LAUNCHES = {"paged_attention_decode": 2, "lm_head_sample": 2, "sample_logits": 2}
_CACHES = ("k_cache", "v_cache")
_TABLES = ("cos", "sin")
# A call that moves values to the host, or host values to the device.
_HOST_METHODS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
_HOST_FUNCTIONS = {"tensor", "as_tensor", "from_numpy"}
_HOST_ATEN = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
}
# Operations of aten that change a tensor's description and launch nothing.
_VIEWS = {
    "view",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "transpose",
    "t",
    "permute",
    "expand",
    "alias",
    "detach",
    "as_strided",
    "split",
    "unbind",
}


@dataclass
class StepRecord:
    """One decode step.

    Args:
        launches: Names in order, an operation of n kernels n times.
        host_reads: What looked at the host, or brought host values along.
        allocations: (name, shape, dtype) of each result.
        scalars: Every number and flag that a launch got.
        pointers: Addresses of the long-lived tensors that launches got.
        num_bytes: Bytes the launches read and write.
        floor_bytes: Weights once, and the keys and values in use.
    """

    launches: list[str] = field(default_factory=list)
    host_reads: list[str] = field(default_factory=list)
    allocations: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    scalars: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    pointers: list[tuple[str, int]] = field(default_factory=list)
    num_bytes: int = 0
    floor_bytes: int = 0


class Recorder:
    """Hands out recording operations and keeps a record of each decode step.

    Use :meth:`watch` on a wrapped engine, then roll out::

        recorder = Recorder()
        with recorder.watch(engine):
            engine.rollout(...)
        recorder.steps[-1].launches
    """

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        # One set: what is captured with it serves every call that is watched.
        self._ops = self.ops()
        self._step: StepRecord | None = None
        self._own: set[int] = set()
        # Storages made within a step stay alive until its end, or an address might recur.
        self._kept: list[torch.Tensor] = []
        self._is_inside_launch = False

    def ops(self) -> Ops:
        """The torch paths, each recorded; they pass for the Triton backend."""
        base = select_ops("torch")
        recorded = {name: self._recorded(name, getattr(base, name)) for name in OP_NAMES}
        return Ops(backend="triton", torch_ops=frozenset(), **recorded)

    @contextmanager
    def watch(self, engine: Any, *, captures: bool = False) -> Iterator[None]:
        """Record the decode steps of a wrapped engine's calls.

        Args:
            engine: From ``tritonhybrid.wrap``.
            captures: Let the steps be captured and replayed as on CUDA; a replay here does in
                Python what was captured, so that each is recorded.
        """
        generation = engine.__dict__["_tritonhybrid"].generation
        generation.ops_override = self._ops
        generation.around_decode = self.step
        if captures:
            generation.replays.capture_override = python_capture
        try:
            yield
        finally:
            generation.ops_override = None
            generation.replays.capture_override = None
            del generation.around_decode

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watch one decode step."""
        self._step = StepRecord()
        self._own.clear()
        try:
            with _HostWatch(self), _LaunchWatch(self):
                yield
            self.steps.append(self._step)
        finally:
            self._step = None
            self._kept.clear()

    @property
    def is_watching(self) -> bool:
        """Whether what happens now is part of a step and outside a launch."""
        return self._step is not None and not self._is_inside_launch

    def host_read(self, name: str) -> None:
        """Something looked at the host."""
        assert self._step is not None
        self._step.host_reads.append(name)

    def aten(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A kernel of torch's own between the launches."""
        assert self._step is not None
        results = _tensors(out)
        if name in _VIEWS:
            return
        self._step.launches.append(name)
        self._note_inputs(name, {str(i): a for i, a in enumerate(args)} | kwargs)
        self._note_outputs(name, results)
        # An index into rows (the embedding) reads as many bytes as it writes.
        self._step.num_bytes += 2 * sum(t.nbytes for t in results)

    def _recorded(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(op)

        def launch(*args: Any, **kwargs: Any) -> Any:
            if not self.is_watching:
                return op(*args, **kwargs)
            assert self._step is not None
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            inputs = dict(bound.arguments)
            self._step.launches += [name] * _LAUNCHES.get(name, 1)
            self._note_inputs(name, inputs)
            self._is_inside_launch = True
            try:
                out = op(*args, **kwargs)
                results = _tensors(out)
                self._note_outputs(name, results)
                self._count_bytes(name, inputs, results)
            finally:
                self._is_inside_launch = False
            return out

        return launch

    def _note_inputs(self, name: str, inputs: dict[str, Any]) -> None:
        assert self._step is not None
        numbers = tuple(v for v in inputs.values() if not isinstance(v, torch.Tensor))
        self._step.scalars.append((name, numbers))
        for key, value in inputs.items():
            for tensor in _tensors(value):
                if tensor.untyped_storage().data_ptr() not in self._own:
                    self._step.pointers.append((f"{name}.{key}", tensor.data_ptr()))

    def _note_outputs(self, name: str, results: list[torch.Tensor]) -> None:
        assert self._step is not None
        for tensor in results:
            self._kept.append(tensor)
            self._own.add(tensor.untyped_storage().data_ptr())
            self._step.allocations.append((name, tuple(tensor.shape), str(tensor.dtype)))

    def _count_bytes(self, name: str, inputs: dict[str, Any], results: list[torch.Tensor]) -> None:
        assert self._step is not None
        num_bytes = sum(tensor.nbytes for tensor in results)
        floor = 0
        tokens = next(v for v in inputs.values() if isinstance(v, torch.Tensor)).shape[0]
        for key, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                continue
            if key in _CACHES:
                row = value[0, 0].nbytes
                rows = tokens
                if "context_lens" in inputs:
                    rows = int(inputs["context_lens"].sum())
                num_bytes += rows * row
                floor += rows * row
            elif key in _TABLES:
                num_bytes += tokens * value[0].nbytes
            else:
                num_bytes += value.nbytes
                is_long_lived = value.untyped_storage().data_ptr() not in self._own
                if is_long_lived and key.endswith(("weight", "bias")):
                    floor += value.nbytes
        self._step.num_bytes += num_bytes
        self._step.floor_bytes += floor


class PythonReplay:
    """In place of a captured graph: does in Python what was captured."""

    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body

    def replay(self) -> None:
        """Run the body."""
        self._body()


def python_capture() -> Callable[[Callable[[], None]], PythonReplay]:
    """What captures where there is no CUDA: runs a body once, as for CUDA's warm-up."""

    def capture(body: Callable[[], None]) -> PythonReplay:
        body()
        return PythonReplay(body)

    return capture


def graph_violations(steps: Sequence[StepRecord]) -> list[str]:
    """What no captured step may do, in words; empty where steps may be captured and replayed.

    Args:
        steps: Of one graph: the first is what was captured, the others what is replayed.
    """
    found = [
        f"step {i} reads {name} on the host" for i, s in enumerate(steps) for name in s.host_reads
    ]
    for index, step in enumerate(steps[1:], 1):
        for what in ("launches", "allocations", "scalars", "pointers"):
            if getattr(step, what) != getattr(steps[0], what):
                found.append(f"step {index} has other {what} than the step captured")
    return found


class _HostWatch(TorchFunctionMode):
    """Sees Python-level reads that never reach the dispatcher (``tolist`` on the CPU)."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self._recorder.is_watching and (
            name in _HOST_METHODS
            or (func is getattr(torch, name, None) and name in _HOST_FUNCTIONS)
        ):
            self._recorder.host_read(name)
        return func(*args, **(kwargs or {}))


class _LaunchWatch(TorchDispatchMode):
    """Sees every kernel of torch's own between the launches."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._recorder.is_watching:
            name = func.overloadpacket.__name__
            if name in _HOST_ATEN or _has_mask(name, args):
                self._recorder.host_read(f"aten::{name}")
            self._recorder.aten(name, args, kwargs or {}, out)
        return out


def _has_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an index by a boolean mask gives a result whose size the device decides."""
    if name not in ("index", "index_put", "index_put_") or len(args) < 2:
        return False
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] or ())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
