"""Carries out the scheduler's steps: batch, forward, sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from tritonhybrid.batch import Batch, DecodeBuffers, prefill_batch
from tritonhybrid.containers.binding import Binding
from tritonhybrid.kv_cache import PagedKVCache
from tritonhybrid.long_rope import LongRope
from tritonhybrid.sampler import Drawn, HeadCalls, Sampled, Sampler
from tritonhybrid.scheduler import Step


class Runner:
    """One step in, its tokens out.

    Args:
        binding: The bound model.
        cache: Keys and values.
        max_num_seqs: Most rows of a decode step.
        max_blocks: Most pages of a sequence.
        device: Where the model computes.
        long_rope: The rule by which sequences change rope tables, if any grows so long.
        around_decode: Entered around the device's part of each decode step, by
            whoever records or profiles it.
    """

    def __init__(
        self,
        binding: Binding,
        cache: PagedKVCache,
        *,
        max_num_seqs: int,
        max_blocks: int,
        device: torch.device,
        long_rope: LongRope | None = None,
        around_decode: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._binding = binding
        self._cache = cache
        self._device = device
        self._long_rope = long_rope
        self._around_decode = around_decode
        self._buffers = DecodeBuffers(max_num_seqs, max_blocks, cache.block_size, device, long_rope)
        head = binding.head
        self.sampler = Sampler(
            binding.step.ops,
            HeadCalls(
                logits=head.logits,
                weight=head.projection.weight,
                bias=head.projection.bias,
                scale=head.scale,
                softcap=head.softcap,
            ),
            device,
            capacity=max_num_seqs,
        )

    def execute(self, step: Step) -> list[Sampled]:
        """Run a step.

        Returns:
            For each of its ``num_steps`` the tokens, rows as in ``step.sampled``.
        """
        self._cache.copy_blocks(step.copies)
        if not step.prefill:
            batch = self._buffers.fill(step.decode)
            self.sampler.prepare(step.decode)
            with self._around_decode():
                drawn = self._decode(batch)
            return [self.sampler.collect(drawn, step.decode)]
        size = self._cache.block_size
        batch = prefill_batch(step.prefill, size, self._device, self._long_rope, step.decode)
        hidden = self._binding.forward(batch)
        sequences = step.sampled
        if not sequences:
            return []
        hidden = hidden[batch.last_rows]
        rows = None
        positions = batch.next_positions
        if len(sequences) > hidden.shape[0]:
            rows = torch.tensor(_owners(step), device=self._device)
            positions = positions[rows]
        self.sampler.prepare(sequences)
        drawn = self.sampler.draw(hidden, positions, rows)
        return [self.sampler.collect(drawn, sequences)]

    def _decode(self, batch: Batch) -> Drawn:
        """The part of a decode step that never looks at the host: what a graph replays."""
        return self.sampler.draw(self._binding.forward(batch), batch.next_positions)


def _owners(step: Step) -> list[int]:
    """For each sequence that samples the row, among those that do, that computes for it."""
    owners = list(range(len(step.decode)))
    for group in step.prefill:
        if group.is_complete:
            owner = owners[-1] + 1 if owners else 0
            owners += [owner] * len(group.members)
    return owners
