"""Whether the decode steps of a call are replayed, and what the next call needs for that."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

import torch

from tritonhybrid.batch import DecodeBuffers
from tritonhybrid.config import HybridConfig
from tritonhybrid.containers.binding import Binding
from tritonhybrid.decode_graphs import (
    GRAPHS_BY_DEFAULT,
    STEPS_PER_REPLAY,
    Capture,
    CudaCapture,
    DecodeGraphs,
    FixedTensors,
    bucket,
)
from tritonhybrid.device_steps import DecodeMemory
from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.kv_cache import PagedKVCache
from tritonhybrid.long_rope import LongRope
from tritonhybrid.replay_sampler import RowSettings
from tritonhybrid.runner import Runner
from tritonhybrid.stats import RolloutStats
from tritonhybrid_kernels.ops import Ops

# The only torch path on the Triton backend that no decode step takes.
_PREFILL_ONLY: Final = frozenset({"attention_varlen"})


class ReplayState:
    """Graphs and the memory they were captured with, call after call.

    A call asks :meth:`consider` before its model is bound, :meth:`memory` after, then
    begins and ends. Decode steps that are not replayed launch their kernels one by one; why
    stands in the call's stats.

    Args:
        config: enable_cuda_graph, decode_steps_per_replay and max_num_seqs are read.
        device: Where the model computes.

    Raises:
        ConfigError: Graphs are wanted where there are none.
    """

    def __init__(self, config: HybridConfig, device: torch.device) -> None:
        if config.enable_cuda_graph is True and device.type != "cuda":
            raise ConfigError(
                explain(
                    "HybridConfig.enable_cuda_graph needs a CUDA device",
                    expected="parameters on cuda",
                    got=f"parameters on {device.type}",
                    hint='Set it to "auto" or false.',
                )
            )
        self._config = config
        self._device = device
        # A recorder's, where there is no CUDA.
        self.capture_override: Callable[[], Capture] | None = None
        self._reason: str | None = None
        self._graphs: DecodeGraphs | None = None
        self._captures_with: Callable[[], Capture] | None = None
        self._memory: DecodeMemory | None = None
        self._fixed = FixedTensors()
        # Addresses name these by identity, so they must not be freed.
        self._held: tuple[object, ...] = ()
        self._before = (0, 0, 0)

    def consider(self, strategy: str, structure: object | None, ops: Ops) -> None:
        """Decide whether the call replays, as far as that is known before the model is bound.

        Args:
            strategy: How the weights were made whole.
            structure: One object as long as the model's structure stays what it is; None
                where it may not.
            ops: The operations of the call.
        """
        self._reason = self._obstacle(strategy, structure, ops)
        self._held = (structure, ops)

    @property
    def fixed(self) -> FixedTensors | None:
        """Where a call that replays keeps its rope tables."""
        return self._fixed if self._reason is None else None

    @property
    def graphs(self) -> DecodeGraphs | None:
        """The call's, after :meth:`memory`; None where it replays nothing."""
        return self._graphs if self._reason is None else None

    def memory(
        self, binding: Binding, cache: PagedKVCache, num_seqs: int, max_blocks: int
    ) -> DecodeMemory:
        """What the call's decode steps read and write; kept if they are replayed.

        Args:
            binding: Entered.
            cache: Keys and values.
            num_seqs: Most sequences in flight.
            max_blocks: Most pages of a sequence.
        """
        self._reason = self._reason or binding.graph_obstacle()
        rope = binding.long_rope
        steps = self.num_steps(binding)
        if self._reason is not None:
            return self._new_memory(num_seqs, max_blocks, cache.block_size, rope, steps)
        new_capture = self.capture_override or CudaCapture
        if self._graphs is None or self._captures_with is not new_capture:
            self._graphs = DecodeGraphs(new_capture)
            self._captures_with = new_capture
        kept = self._memory
        num_rows = bucket(max(num_seqs, self._config.max_num_seqs))
        if kept is None or not kept.buffers.fits(
            num_rows, max_blocks, cache.block_size, rope, steps
        ):
            # A table that grows step by step would be captured again each time.
            width = 1 << (max_blocks - 1).bit_length()
            self._memory = self._new_memory(num_rows, width, cache.block_size, rope, steps)
        assert self._memory is not None
        return self._memory

    def num_steps(self, binding: Binding) -> int:
        """Decode steps between two looks at the host, known after :meth:`memory`."""
        if not binding.is_fused:
            # HF's own code writes keys of all rows, also of those that have ended.
            return 1
        steps = self._config.decode_steps_per_replay
        if steps == "auto":
            return 1 if self._reason is not None else STEPS_PER_REPLAY
        return steps

    def begin(self, runner: Runner, binding: Binding, cache: PagedKVCache, num_seqs: int) -> None:
        """Let the runner's steps be captured and replayed, as long as no address has changed."""
        graphs = self.graphs
        if graphs is None:
            return
        self._before = (graphs.num_replays, graphs.num_captures, graphs.num_recaptures)
        graphs.begin(
            self._addresses(binding, cache),
            largest=num_seqs,
            run=runner.device_steps.carry_out,
            blank=runner.device_steps.blank,
        )

    def end(self, stats: RolloutStats, host_rules: set[str]) -> None:
        """End a call and write down what was replayed, and why the rest was not.

        Args:
            stats: Of the call.
            host_rules: What had the host prepare single tokens.
        """
        reasons = [] if self._reason is None else [self._reason]
        graphs = self.graphs
        if graphs is not None:
            graphs.end()
            now = (graphs.num_replays, graphs.num_captures, graphs.num_recaptures)
            replays, captures, recaptures = (
                after - before for after, before in zip(now, self._before, strict=True)
            )
            stats.graph_hits, stats.graph_captures = replays, captures
            stats.graph_recaptures = recaptures
            reasons += [] if graphs.reason is None else [graphs.reason]
            reasons += [f"the host prepares each token: {rule}" for rule in sorted(host_rules)]
        stats.graph_reason = "; ".join(reasons)
        if self._config.decode_steps_per_replay != "auto" and stats.path != "fused":
            stats.note("decode_steps_per_replay is 1 where layers run in HF's own code")

    def release(self) -> None:
        """Give graphs and memory back; a graph of a cache that is gone could not be replayed."""
        if self._graphs is not None:
            self._graphs.release()
            self._graphs.end()
        self._memory = None
        self._fixed = FixedTensors()
        self._held = ()

    def _obstacle(self, strategy: str, structure: object | None, ops: Ops) -> str | None:
        wanted = self._config.enable_cuda_graph
        if wanted is False:
            return "enable_cuda_graph is false"
        if self.capture_override is None:
            if wanted == "auto" and not GRAPHS_BY_DEFAULT:
                return 'enable_cuda_graph is "auto": off until a GPU has run graphs'
            if self._device.type != "cuda":
                return f"parameters are on {self._device.type}: only CUDA has graphs"
            if ops.backend != "triton":
                return f"the {ops.backend} backend reads the host in a decode step"
        on_torch = sorted(ops.torch_ops - _PREFILL_ONLY)
        if on_torch:
            return f"torch paths may read the host: {', '.join(on_torch)}"
        if strategy == "foreign":
            return "the caller's gather brings new addresses with each call"
        if structure is None:
            return "the model's hooks come and go, so nothing captured would last"
        if self._graphs is not None and not self._graphs.keys:
            return self._graphs.reason
        return None

    def _new_memory(
        self, num_seqs: int, max_blocks: int, block_size: int, rope: LongRope | None, steps: int
    ) -> DecodeMemory:
        return DecodeMemory(
            DecodeBuffers(num_seqs, max_blocks, block_size, self._device, rope, steps),
            RowSettings(num_seqs, self._device),
        )

    def _addresses(self, binding: Binding, cache: PagedKVCache) -> Hashable:
        """All that a graph is captured with and that is not written anew for each step."""
        model = binding.parts.model
        memory = self._memory
        assert memory is not None
        return (
            tuple(id(each) for each in self._held),
            tuple(p.data_ptr() for p in model.parameters()),
            tuple(b.data_ptr() for b in model.buffers()),
            tuple(pages.data_ptr() for pages in (*cache.keys, *cache.values)),
            (cache.geometry, cache.block_size, cache.keys[0].dtype),
            (memory.buffers.addresses, memory.settings.addresses, self._fixed.addresses),
            (binding.long_rope, binding.head.description),
        )
