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
from tritonhybrid.sequence import Sequence


class Runner:
    """One step in, one token a sequence out.

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

    def execute(self, step: Step) -> tuple[list[Sequence], Sampled]:
        """Run a step.

        Returns:
            The sequences that get a token, and the tokens.
        """
        if step.decode:
            self._cache.copy_blocks(step.copies)
            batch = self._buffers.fill(step.decode)
            self.sampler.prepare(step.decode)
            with self._around_decode():
                drawn = self._decode(batch)
            return step.decode, self.sampler.collect(drawn, step.decode)
        size = self._cache.block_size
        batch = prefill_batch(step.prefill, size, self._device, self._long_rope)
        hidden = self._binding.forward(batch)[batch.last_rows]
        sequences = [member for group in step.prefill for member in group.members]
        rows = None
        if len(sequences) > len(step.prefill):
            owners = [i for i, group in enumerate(step.prefill) for _ in group.members]
            rows = torch.tensor(owners, device=self._device)
        positions = batch.next_positions if rows is None else batch.next_positions[rows]
        self.sampler.prepare(sequences)
        drawn = self.sampler.draw(hidden, positions, rows)
        return sequences, self.sampler.collect(drawn, sequences)

    def _decode(self, batch: Batch) -> Drawn:
        """The part of a decode step that never looks at the host: what a graph replays."""
        return self.sampler.draw(self._binding.forward(batch), batch.next_positions)
