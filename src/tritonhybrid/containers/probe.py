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

import torch
from torch import nn

from tritonhybrid.containers.description import NotDescribableError
from tritonhybrid.containers.experts import GRAPH_LEGAL_EXPERTS, eager_experts_configs
from tritonhybrid.containers.misfits import MISFITS
from tritonhybrid.containers.norm import is_rms_norm
from tritonhybrid.containers.parts import ModelParts, configs
from tritonhybrid.containers.patches import Patches
from tritonhybrid.containers.plan import LayerPlan, plan_layers
from tritonhybrid.containers.reference import run_reference
from tritonhybrid.containers.rope import long_rope, short_original
from tritonhybrid.containers.trial import TOLERANCE, Trial, distance
from tritonhybrid.errors import KernelArgumentError, TritonHybridError, UnsupportedModelError
from tritonhybrid.kv_cache import LayerGeometry
from tritonhybrid.long_rope import LongRope
from tritonhybrid_kernels.ops import Ops

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
        verdict,
        plans=tuple(
            plan if (plan.path, plan.experts) == (found.path, found.experts) else found
            for plan, found in pairs
        ),
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


@dataclass
class _Findings:
    """What was noticed on the way to a verdict, and whether a later call may find otherwise."""

    notes: list[str] = field(default_factory=list)
    is_lasting: bool = True

    def forgive(self, error: Exception) -> str:
        """Take a path's failure as its verdict, or raise what is no fault of the path."""
        refusals = (KernelArgumentError, UnsupportedModelError)
        # Errors of ours, and of memory, say nothing about how the model computes.
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, TritonHybridError) and not isinstance(error, refusals)
        ):
            raise error
        self.is_lasting = self.is_lasting and not _may_pass(error)
        first_line = str(error).splitlines()[0] if str(error) else ""
        return f"{type(error).__name__}: {first_line}"[:200]

    def to_hf(self, reason: str) -> Verdict:
        """HF's loop serves, for a reason."""
        return Verdict((), (), False, (reason,), is_lasting=self.is_lasting)


def _probe(parts: ModelParts, plans: list[LayerPlan], ops: Ops, rope: LongRope | None) -> Verdict:
    findings = _Findings()
    try:
        reference = run_reference(parts)
        if reference.hidden.dtype not in TOLERANCE:
            raise ValueError(f"hidden states in {reference.hidden.dtype}")
    except MISFITS as error:
        failure = findings.forgive(error)
        return findings.to_hf(f"HF's forward does not fit the packed form ({failure})")
    if not (reference.hidden.isfinite().all() and reference.logits.isfinite().all()):
        # Nothing can be held against it; better weights may come with the next step.
        findings.is_lasting = False
        return findings.to_hf("HF's own forward gives values that are not finite")
    trial = Trial(parts, ops, reference, rope)
    plans = [_check_norms(plan, parts.layers[plan.layer], findings) for plan in plans]
    if any(plan.path == "fused" for plan in plans):
        plans = _check_layers(trial, plans, findings)
    reason = _check_head(trial, findings)
    if reason is not None:
        return findings.to_hf("; ".join([*findings.notes, reason]))
    for attempt in _attempts(plans):
        reason = _check_model(trial, attempt, findings)
        if reason is None:
            if any(eager_experts_configs(layer) for layer in parts.layers) and not any(
                plan.experts for plan in attempt
            ):
                findings.notes.append("a decode step reads the host: eager experts")
            return Verdict(
                tuple(attempt),
                tuple(reference.geometry),
                reference.returns_tuple,
                tuple(findings.notes),
                is_lasting=findings.is_lasting,
            )
        findings.notes.append(reason)
    return findings.to_hf("; ".join(findings.notes))


def _check_norms(plan: LayerPlan, layer: nn.Module, findings: _Findings) -> LayerPlan:
    """Hold each norm that the container would read raw against its formula."""
    for path, eps, offset in plan.description.norms if plan.description is not None else ():
        norm = layer.get_submodule(path)
        if not is_rms_norm(norm, eps, offset):
            reason = f"{path} is a {type(norm).__name__} that is not the RMS norm described"
            findings.notes.append(f"layer {plan.layer}: {reason}")
            return plan.demoted("generic", reason)
    return plan


def _check_layers(trial: Trial, plans: list[LayerPlan], findings: _Findings) -> list[LayerPlan]:
    """Compare each fused layer alone, fed with HF's own input of that layer."""
    checked = list(plans)
    for errors_of, tolerance, what in (
        (trial.layer_errors, trial.tolerance, "fused differs from HF"),
        (trial.score_errors, trial.score_tolerance, "fused differs from HF at high scores"),
    ):
        try:
            errors = errors_of(checked)
        except MISFITS as misfit:
            findings.notes.append(f"the fused container failed ({findings.forgive(misfit)})")
            return _all_generic(plans)
        for index, error in errors.items():
            if not error <= tolerance:
                reason = f"{what} by {error:.1e}"
                checked[index] = plans[index].demoted("generic", reason)
                findings.notes.append(f"layer {index}: {reason}")
    return checked


def _check_head(trial: Trial, findings: _Findings) -> str | None:
    """Compare logits of the same hidden states, large ones too; says what is wrong."""
    try:
        error = trial.head_error()
    except MISFITS as misfit:
        return f"the head failed ({findings.forgive(misfit)})"
    if not error <= trial.head_tolerance:
        return f"the head's logits differ from HF's by {error:.1e}"
    return None


def _check_model(trial: Trial, plans: list[LayerPlan], findings: _Findings) -> str | None:
    """Compare prefill and one decode step; says what is wrong."""
    name = "fused" if all(plan.path == "fused" for plan in plans) else "generic"
    try:
        hidden, logits, counts = trial.run(plans)
    except MISFITS as misfit:
        return f"the {name} path failed ({findings.forgive(misfit)})"
    expected = sum(plan.path == "generic" for plan in plans)
    if counts != (expected, expected):
        return (
            f"{type(trial.parts.model).__name__} called our attention and cache "
            f"{counts[0]} and {counts[1]} times for {expected} layers"
        )
    error = distance(hidden, trial.reference.hidden)
    if not error <= trial.model_tolerance:
        return f"{name} hidden states differ from HF's by {error:.1e}"
    error = distance(logits, trial.reference.logits)
    if not error <= trial.model_tolerance:
        return f"{name} logits differ from HF's by {error:.1e}"
    return None


def _attempts(plans: list[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Plans to try, each slower than the one before."""
    yield plans
    generic = _all_generic(plans)
    if generic != plans:
        yield generic
    if any(plan.experts for plan in generic):
        reason = f"eager experts: those by {GRAPH_LEGAL_EXPERTS} failed"
        yield [
            replace(plan, reason=reason, experts=None) if plan.experts else plan for plan in generic
        ]


def _all_generic(plans: list[LayerPlan]) -> list[LayerPlan]:
    return [
        plan if plan.path == "generic" else plan.demoted("generic", "the fused model failed")
        for plan in plans
    ]


def _may_pass(error: Exception) -> bool:
    """Whether the next call may fare better, as after a user's hook or a device that failed once.

    Asked anew each call, the probe costs a few tiny forwards beside HF's own loop.
    """
    return isinstance(error, RuntimeError) and not isinstance(error, TritonHybridError)
