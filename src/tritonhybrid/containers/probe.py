"""The bind-time probe: our path against HF's forward on two tiny prompts.

Run with the real weights at the first materialisation, so that "never wrong
tokens" is a fact of the run and not a claim of a table. A layer that differs
goes to the next path: fused, generic, HF's own loop.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tritonhybrid.batch import DecodeBuffers, prefill_batch
from tritonhybrid.containers.binding import Binding
from tritonhybrid.containers.description import NotDescribableError
from tritonhybrid.containers.parts import ModelParts, cache_name, configs
from tritonhybrid.containers.patches import Patches
from tritonhybrid.containers.plan import LayerPlan, plan_layers
from tritonhybrid.containers.rope import long_rope, short_original
from tritonhybrid.errors import KernelArgumentError, TritonHybridError, UnsupportedModelError
from tritonhybrid.kv_cache import LayerGeometry, PagedKVCache
from tritonhybrid.long_rope import LongRope
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.scheduler import PrefillGroup
from tritonhybrid.sequence import Sequence
from tritonhybrid_kernels.ops import Ops

# Relative L2 of a layer's contribution that rounding explains; a wrong rule is off by 0.1 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# How code that does not fit a model fails; anything else is a fault, and not for the probe to hide.
_MISFITS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_LENGTHS = (7, 4)
_BLOCK_SIZE = 16
_SHORT_WINDOW = 3
_SHORT_ROPE = 5


@dataclass(frozen=True)
class Verdict:
    """What the probe found.

    Args:
        plans: Final path of each layer; empty when HF's loop must serve.
        geometry: What each layer caches.
        returns_tuple: Whether HF's layers return tuples.
        notes: Demotions, in words.
        is_lasting: Whether it holds for later calls too.
    """

    plans: tuple[LayerPlan, ...]
    geometry: tuple[LayerGeometry, ...]
    returns_tuple: bool
    notes: tuple[str, ...]
    is_lasting: bool = True

    @property
    def is_native(self) -> bool:
        """Whether our loop may serve the model."""
        return bool(self.plans)


@dataclass
class _Reference:
    """HF's own results on the probe's prompts, packed."""

    tokens: list[tuple[int, ...]]
    layer_inputs: list[torch.Tensor] = field(default_factory=list)
    layer_outputs: list[torch.Tensor] = field(default_factory=list)
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    geometry: list[LayerGeometry] = field(default_factory=list)
    returns_tuple: bool = False


def probe(parts: ModelParts, plans: list[LayerPlan], ops: Ops) -> Verdict:
    """Hold the planned paths against HF's forward and demote what differs.

    Args:
        parts: The model, in eval mode, parameters whole, DeepSpeed's hooks aside.
        plans: From :func:`tritonhybrid.containers.plan.plan_layers`.
        ops: The operations that will serve.

    Returns:
        The verdict; its plans are empty if only HF's own loop is right.
    """
    with _short_windows(parts), _short_rope(parts) as rope:
        verdict = _probe(parts, plan_layers(parts), ops, rope)
    if not verdict.is_native:
        return verdict
    # A layer that passed is bound by its description with the true window.
    pairs = zip(plans, verdict.plans, strict=True)
    return replace(
        verdict, plans=tuple(plan if plan.path == found.path else found for plan, found in pairs)
    )


@contextmanager
def _short_windows(parts: ModelParts) -> Iterator[None]:
    """Attention windows and chunks of a few tokens, so that the probe's prompts cross them.

    A window that HF applies through its mask alone, or one that our side reads wrongly,
    would otherwise show only past thousands of tokens. Masks, layers and policies all
    take it from here: the configs, and what the modules copied of them.
    """
    patches = Patches()
    try:
        for owner in (*configs(parts.model), *parts.model.modules()):
            for name in ("sliding_window", "attention_chunk_size"):
                size = owner.__dict__.get(name)
                if isinstance(size, int) and size > _SHORT_WINDOW:
                    patches.set(owner, name, _SHORT_WINDOW)
        yield
    finally:
        patches.undo()


@contextmanager
def _short_rope(parts: ModelParts) -> Iterator[LongRope | None]:
    """Longrope whose short table one of the probe's prompts fits and the other does not."""
    try:
        rope = long_rope(parts, sys.maxsize)
    except NotDescribableError:
        # Only what fits the short table will be served here.
        rope = None
    if rope is None:
        yield None
        return
    with short_original(parts, _SHORT_ROPE):
        yield replace(rope, original=_SHORT_ROPE)


def _probe(parts: ModelParts, plans: list[LayerPlan], ops: Ops, rope: LongRope | None) -> Verdict:
    notes: list[str] = []
    try:
        reference = _run_reference(parts)
    except _MISFITS as error:
        _raise_if_not_the_models(error)
        verdict = _to_hf(f"HF's forward does not fit the packed form ({_brief(error)})")
        return replace(verdict, is_lasting=not _may_pass(error))
    if not (reference.hidden.isfinite().all() and reference.logits.isfinite().all()):
        # Nothing can be held against it; better weights may come with the next step.
        verdict = _to_hf("HF's own forward gives values that are not finite")
        return replace(verdict, is_lasting=False)
    trial = _Trial(parts, ops, reference, rope)
    if any(plan.path == "fused" for plan in plans):
        plans = _check_layers(trial, plans, notes)
    for attempt in (plans, _all_generic(plans)):
        reason = _check_model(trial, attempt)
        if reason is None:
            return Verdict(
                tuple(attempt),
                tuple(reference.geometry),
                reference.returns_tuple,
                tuple(notes),
                is_lasting=trial.is_lasting,
            )
        notes.append(reason)
        if all(plan.path == "generic" for plan in attempt):
            break
    return replace(_to_hf("; ".join(notes)), is_lasting=trial.is_lasting)


def _check_layers(trial: _Trial, plans: list[LayerPlan], notes: list[str]) -> list[LayerPlan]:
    """Compare each fused layer alone, fed with HF's own input of that layer."""
    checked = list(plans)
    try:
        errors = trial.layer_errors(plans)
    except _MISFITS as error:
        trial.forgive(error)
        notes.append(f"the fused container failed ({_brief(error)})")
        return _all_generic(plans)
    for index, distance in errors.items():
        if not distance <= trial.tolerance:
            reason = f"fused differs from HF by {distance:.1e}"
            checked[index] = plans[index].demoted("generic", reason)
            notes.append(f"layer {index}: {reason}")
    return checked


def _check_model(trial: _Trial, plans: list[LayerPlan]) -> str | None:
    """Compare prefill, one decode step and the head; says what is wrong."""
    name = "fused" if all(plan.path == "fused" for plan in plans) else "generic"
    try:
        hidden, logits, counts = trial.run(plans)
    except _MISFITS as error:
        trial.forgive(error)
        return f"the {name} path failed ({_brief(error)})"
    expected = sum(plan.path == "generic" for plan in plans)
    if counts != (expected, expected):
        return (
            f"{type(trial.parts.model).__name__} called our attention and cache "
            f"{counts[0]} and {counts[1]} times for {expected} layers"
        )
    distance = _distance(hidden, trial.reference.hidden)
    if not distance <= trial.model_tolerance:
        return f"{name} hidden states differ from HF's by {distance:.1e}"
    distance = _distance(logits, trial.reference.logits)
    if not distance <= trial.model_tolerance:
        return f"{name} logits differ from HF's by {distance:.1e}"
    return None


class _Trial:
    """Runs candidate plans on the probe's prompts."""

    def __init__(
        self, parts: ModelParts, ops: Ops, reference: _Reference, rope: LongRope | None
    ) -> None:
        self.parts = parts
        self.ops = ops
        self.reference = reference
        self.long_rope = rope
        self.dtype = reference.hidden.dtype
        self.device = reference.hidden.device
        self.tolerance = _TOLERANCE[self.dtype]
        # Rounding adds up over layers like a random walk.
        self.model_tolerance = self.tolerance * max(1.0, len(parts.layers) ** 0.5)
        self.is_lasting = True

    def forgive(self, error: Exception) -> None:
        """Take a path's failure as its verdict, or raise what is no fault of the path."""
        _raise_if_not_the_models(error)
        self.is_lasting = self.is_lasting and not _may_pass(error)

    def layer_errors(self, plans: list[LayerPlan]) -> dict[int, float]:
        """Distance of each fused layer's contribution from HF's."""
        errors = {}
        with self._bind(plans) as binding:
            batch = prefill_batch(self._groups(0), _BLOCK_SIZE, self.device, self.long_rope)
            for plan in plans:
                if plan.path == "fused":
                    x = self.reference.layer_inputs[plan.layer]
                    y = self.reference.layer_outputs[plan.layer]
                    out = binding.container(plan.layer)(x, batch)
                    errors[plan.layer] = _contribution_distance(out, y, x)
        return errors

    def run(self, plans: list[LayerPlan]) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """Prefill all but the last token, decode it; hidden rows in packed order."""
        with self._bind(plans) as binding:
            groups = self._groups(1)
            batch = prefill_batch(groups, _BLOCK_SIZE, self.device, self.long_rope)
            first = binding.forward(batch)
            leaders = [group.leader for group in groups]
            for sequence, tokens in zip(leaders, self.reference.tokens, strict=True):
                sequence.append(tokens[-1], 0.0, 0.0)
            buffers = DecodeBuffers(len(leaders), 1, _BLOCK_SIZE, self.device, self.long_rope)
            last = binding.forward(buffers.fill(leaders))
            counts = (binding.step.num_attentions, binding.step.num_updates)
            rows = []
            start = 0
            for row, tokens in enumerate(self.reference.tokens):
                rows += [first[start : start + len(tokens) - 1], last[row : row + 1]]
                start += len(tokens) - 1
            return torch.cat(rows), binding.head.logits(last), counts

    def _bind(self, plans: list[LayerPlan]) -> Binding:
        cache = PagedKVCache(
            self.reference.geometry, len(_LENGTHS), _BLOCK_SIZE, self.dtype, self.device
        )
        return Binding(
            self.parts,
            plans,
            self.ops,
            cache,
            max_length=max(_LENGTHS),
            long_rope=self.long_rope,
            returns_tuple=self.reference.returns_tuple,
        )

    def _groups(self, leave_out: int) -> list[PrefillGroup]:
        groups = []
        for index, tokens in enumerate(self.reference.tokens):
            sequence = Sequence(
                prompt_index=index,
                sample_index=0,
                uid=index,
                key=0,
                prompt=tokens[: len(tokens) - leave_out],
                prompt_key=index,
                params=SamplingParams(max_new_tokens=2),
                end_ids=frozenset(),
            )
            # The pages are given out crossed, so that a table that is ignored is noticed.
            sequence.block_table = [len(_LENGTHS) - 1 - index]
            groups.append(PrefillGroup(sequence))
        return groups


def _run_reference(parts: ModelParts) -> _Reference:
    """Each prompt alone through HF's own forward, every layer's input and output kept."""
    usable = [t for t in range(parts.vocab_size) if t not in _special_tokens(parts)][:64]
    if not usable:
        raise ValueError("every token of the vocabulary is special")
    tokens = [
        tuple(usable[(7 * i + 3 * row + 1) % len(usable)] for i in range(length))
        for row, length in enumerate(_LENGTHS)
    ]
    reference = _Reference(tokens)
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
    if reference.hidden.dtype not in _TOLERANCE:
        raise ValueError(f"hidden states in {reference.hidden.dtype}")
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


def _all_generic(plans: list[LayerPlan]) -> list[LayerPlan]:
    return [
        plan if plan.path == "generic" else plan.demoted("generic", "the fused model failed")
        for plan in plans
    ]


def _to_hf(reason: str) -> Verdict:
    return Verdict((), (), False, (reason,))


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference = (ours.double() - theirs.double()).norm()
    return float(difference / theirs.double().norm().clamp_min(1e-30))


def _contribution_distance(
    ours: torch.Tensor, theirs: torch.Tensor, residual: torch.Tensor
) -> float:
    """Relative to what the layer adds, plus what rounding the sum alone may cost."""
    difference = (ours.double() - theirs.double()).norm()
    added = (theirs.double() - residual.double()).norm()
    rounding = torch.finfo(ours.dtype).eps * theirs.double().norm()
    return float(difference / (added + rounding).clamp_min(1e-30))


def _raise_if_not_the_models(error: Exception) -> None:
    """Errors of ours, and of memory, say nothing about how the model computes."""
    refusals = (KernelArgumentError, UnsupportedModelError)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, TritonHybridError) and not isinstance(error, refusals)
    ):
        raise error


def _may_pass(error: Exception) -> bool:
    """Whether the next call may fare better, as after a user's hook or a device that failed once.

    Asked anew each call, the probe costs two tiny forwards beside HF's own loop.
    """
    return isinstance(error, RuntimeError)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
