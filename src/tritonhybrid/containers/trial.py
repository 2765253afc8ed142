"""A candidate plan on the probe's prompts, and how far it is from HF's results."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from tritonhybrid.batch import DecodeBuffers, prefill_batch
from tritonhybrid.containers.binding import Binding
from tritonhybrid.containers.description import describe_head
from tritonhybrid.containers.head import Head
from tritonhybrid.containers.parts import ModelParts
from tritonhybrid.containers.plan import LayerPlan
from tritonhybrid.containers.reference import PROMPT_LENGTHS, Reference, layer_inputs
from tritonhybrid.containers.scores import SCORE_TOLERANCE, high_scores
from tritonhybrid.kv_cache import PagedKVCache
from tritonhybrid.long_rope import LongRope
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.scheduler import PrefillGroup
from tritonhybrid.sequence import Sequence
from tritonhybrid_kernels.ops import Ops

# Relative L2 of a layer's contribution that rounding explains; a wrong rule is off by 0.1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# The same of logits of one and the same hidden state: one product, rounded once or twice.
_HEAD_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_BLOCK_SIZE = 16


class Trial:
    """Runs candidate plans on the probe's prompts.

    Args:
        parts: The model.
        ops: The operations that will serve.
        reference: HF's own results.
        long_rope: The rule of a model with two rope tables.
    """

    def __init__(
        self, parts: ModelParts, ops: Ops, reference: Reference, rope: LongRope | None
    ) -> None:
        self.parts = parts
        self.ops = ops
        self.reference = reference
        self.long_rope = rope
        self.dtype = reference.hidden.dtype
        self.device = reference.hidden.device
        self.tolerance = TOLERANCE[self.dtype]
        self.score_tolerance = SCORE_TOLERANCE[self.dtype]
        self.head_tolerance = _HEAD_TOLERANCE[self.dtype]
        # Rounding adds up over layers like a random walk.
        self.model_tolerance = self.tolerance * max(1.0, len(parts.layers) ** 0.5)

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

    def score_errors(self, plans: list[LayerPlan]) -> dict[int, float]:
        """Distance of what each fused layer's attention gives from HF's, where scores are high."""
        fused = {plan.layer: plan.description for plan in plans if plan.description is not None}
        if not fused:
            return {}
        with ExitStack() as lifted:
            attended = {
                index: lifted.enter_context(high_scores(self.parts.layers[index], description))
                for index, description in fused.items()
            }
            inputs = layer_inputs(self.parts, self.reference)
            theirs = {index: torch.cat(own) for index, own in attended.items()}
            with self._bind(plans) as binding:
                batch = prefill_batch(self._groups(0), _BLOCK_SIZE, self.device, self.long_rope)
                for index in fused:
                    binding.container(index)(inputs[index], batch)
            return {index: distance(own[-1], theirs[index]) for index, own in attended.items()}

    def head_error(self) -> float:
        """Largest distance of our logits from HF's on one row of hidden states."""
        head = Head(self.parts.head, describe_head(self.parts), self.ops)
        reference = self.reference
        rows = [
            distance(ours, theirs)
            for ours, theirs in zip(
                head.logits(reference.head_inputs), reference.head_logits, strict=True
            )
            # Rows that were enlarged past what fp16 can hold say nothing.
            if theirs.isfinite().all()
        ]
        # Not Python's max, which may pass over a NaN.
        return float(torch.tensor(rows).max())

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
            self.reference.geometry, len(PROMPT_LENGTHS), _BLOCK_SIZE, self.dtype, self.device
        )
        return Binding(
            self.parts,
            plans,
            self.ops,
            cache,
            max_length=max(PROMPT_LENGTHS),
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
            sequence.block_table = [len(PROMPT_LENGTHS) - 1 - index]
            groups.append(PrefillGroup(sequence))
        return groups


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 distance, NaN where either is."""
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
