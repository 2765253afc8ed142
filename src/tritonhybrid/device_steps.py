"""Decode steps that follow one another on the device, each feeding the next, as graphs or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import cast

from tritonhybrid.batch import DecodeBuffers
from tritonhybrid.containers.binding import Binding
from tritonhybrid.decode_graphs import DecodeGraphs, GraphKey, bucket
from tritonhybrid.replay_sampler import DrawPlan, ReplaySampler, RowSettings
from tritonhybrid.sampler import HeadCalls, Sampled, check_finite
from tritonhybrid.scheduler import Step


@dataclass(frozen=True)
class DecodeMemory:
    """What decode steps read and write besides weights and pages.

    Args:
        buffers: Their inputs.
        settings: How each row samples.
    """

    buffers: DecodeBuffers
    settings: RowSettings


class DeviceSteps:
    """Runs the decode steps of sequences that need no host in between.

    Args:
        binding: The bound model.
        head: Its head, for the sampler.
        memory: At the addresses that graphs were captured with, where there are any.
        used: Names of the samplers that drew; added to.
        around_decode: Entered around each step, by whoever records or profiles it.
        graphs: Of this call, or None to launch every kernel by itself.
    """

    def __init__(
        self,
        binding: Binding,
        head: HeadCalls,
        memory: DecodeMemory,
        used: set[str],
        around_decode: Callable[[], AbstractContextManager[None]],
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._binding = binding
        self._ops = binding.step.ops
        self._buffers = memory.buffers
        self._around_decode = around_decode
        self._graphs = graphs
        self._sampler = ReplaySampler(self._ops, head, memory.settings, used)

    def run(self, step: Step) -> list[Sampled]:
        """Carry a decode step out and look at its tokens once.

        Args:
            step: Without prompts; none of its sequences has a ``host_rule``.

        Returns:
            For each of its ``num_steps`` the tokens; what stands behind a sequence's end is
            arbitrary.

        Raises:
            NonFiniteLogitsError: A row's logits are not finite.
        """
        if self._graphs is None or not self._replay(step, self._graphs):
            count = len(step.decode)
            plan = self._sampler.prepare(step.decode, count)
            self._buffers.fill(step.decode, num_steps=step.num_steps)
            self.carry_out(GraphKey(count, step.num_steps, plan))
        return self._collect(step)

    def carry_out(self, key: GraphKey) -> None:
        """Do a key's steps on the inputs as they stand; nothing looks at the host."""
        batch = self._buffers.batch(key.num_rows)
        plan = cast("DrawPlan", key.draw)
        for _ in range(key.num_steps):
            with self._around_decode():
                hidden = self._binding.forward(batch)
                drawn = self._sampler.draw(hidden, batch.next_positions, plan)
                self._buffers.advance(
                    self._ops, batch, drawn.tokens, drawn.logprobs, drawn.raw_logprobs
                )

    def blank(self, key: GraphKey) -> None:
        """Make every row padding: then a key's steps write no page and keep no token."""
        self._buffers.fill([], key.num_rows)
        self._sampler.prepare([], key.num_rows)

    def _replay(self, step: Step, graphs: DecodeGraphs) -> bool:
        """Replay a step's graph, if there is one or can be."""
        num_rows = bucket(len(step.decode))
        key = GraphKey(
            num_rows, self._buffers.max_steps, self._sampler.prepare(step.decode, num_rows)
        )
        times = 1
        if step.num_steps != key.num_steps:
            # Near an end, or short of pages: one graph of a single step serves any number.
            key, times = replace(key, num_steps=1), step.num_steps
        if not graphs.has(key):
            return False
        # Capturing may have made the rows padding.
        self._sampler.prepare(step.decode, num_rows)
        self._buffers.fill(step.decode, num_rows, step.num_steps)
        for _ in range(times):
            graphs.replay(key)
        return True

    def _collect(self, step: Step) -> list[Sampled]:
        tokens, logprobs, raw_logprobs = (
            values[: step.num_steps, : len(step.decode)].tolist() for values in self._buffers.read()
        )
        for row, sequence in enumerate(step.decode):
            for index in range(min(step.num_steps, sequence.num_left)):
                values = (logprobs[index][row], raw_logprobs[index][row])
                check_finite(sequence, len(sequence) + index, values)
                if tokens[index][row] in sequence.end_ids:
                    break
        return [
            Sampled(*columns, {}, {})
            for columns in zip(tokens, logprobs, raw_logprobs, strict=True)
        ]
