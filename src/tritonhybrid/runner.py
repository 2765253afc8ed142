"""Carries out the scheduler's steps: batch, forward, sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from tritonhybrid.batch import prefill_batch
from tritonhybrid.containers.binding import Binding
from tritonhybrid.decode_graphs import DecodeGraphs
from tritonhybrid.device_steps import DecodeMemory, DeviceSteps
from tritonhybrid.kv_cache import PagedKVCache
from tritonhybrid.sampler import HeadCalls, Sampled, Sampler
from tritonhybrid.scheduler import Step


class Runner:
    """One step in, its tokens out.

    Args:
        binding: The bound model.
        cache: Keys and values.
        memory: For the decode steps.
        max_num_seqs: Most rows of a decode step.
        device: Where the model computes.
        graphs: Replay decode steps, where that is possible.
        around_decode: Entered around the device's part of each decode step, by
            whoever records or profiles it.
    """

    def __init__(
        self,
        binding: Binding,
        cache: PagedKVCache,
        memory: DecodeMemory,
        *,
        max_num_seqs: int,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
        around_decode: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._binding = binding
        self._cache = cache
        self._device = device
        self._around_decode = around_decode
        self._buffers = memory.buffers
        self._has_graphs = graphs is not None
        head = HeadCalls(
            logits=binding.head.logits,
            weight=binding.head.projection.weight,
            bias=binding.head.projection.bias,
            scale=binding.head.scale,
            softcap=binding.head.softcap,
        )
        self.sampler = Sampler(binding.step.ops, head, device, capacity=max_num_seqs)
        self.device_steps = DeviceSteps(
            binding, head, memory, self.sampler.used, around_decode, graphs
        )
        # What had the host prepare single tokens, where they could have been replayed.
        self.host_rules: set[str] = set()

    def execute(self, step: Step) -> list[Sampled]:
        """Run a step.

        Returns:
            For each of its ``num_steps`` the tokens, rows as in ``step.sampled``.
        """
        self._cache.copy_blocks(step.copies)
        if not step.prefill:
            return self._decode(step)
        size, rope = self._cache.block_size, self._binding.long_rope
        batch = prefill_batch(step.prefill, size, self._device, rope, step.decode)
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

    def _decode(self, step: Step) -> list[Sampled]:
        if self._has_graphs or step.num_steps > 1:
            rules = {sequence.host_rule for sequence in step.decode} - {None}
            if not rules:
                return self.device_steps.run(step)
            assert step.num_steps == 1, "the scheduler looks at each token of such sequences"
            self.host_rules |= {str(rule) for rule in rules}
        batch = self._buffers.fill(step.decode)
        self.sampler.prepare(step.decode)
        with self._around_decode():
            drawn = self.sampler.draw(self._binding.forward(batch), batch.next_positions)
        return [self.sampler.collect(drawn, step.decode)]


def _owners(step: Step) -> list[int]:
    """For each sequence that samples the row, among those that do, that computes for it."""
    owners = list(range(len(step.decode)))
    for group in step.prefill:
        if group.is_complete:
            owner = owners[-1] + 1 if owners else 0
            owners += [owner] * len(group.members)
    return owners
