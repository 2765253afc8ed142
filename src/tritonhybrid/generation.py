"""Serves sequences from the weights being trained: whole weights, bound containers, the loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Hashable, Iterator
from collections.abc import Sequence as Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tritonhybrid.block_manager import BlockManager
from tritonhybrid.cache_pool import CachePool
from tritonhybrid.call import Call
from tritonhybrid.config import HybridConfig
from tritonhybrid.containers.binding import Binding
from tritonhybrid.containers.joined import neighbours
from tritonhybrid.containers.parts import ModelParts, causal_model, find_parts, own_generate
from tritonhybrid.containers.patches import Patches
from tritonhybrid.containers.plan import count_paths, fingerprint, plan_layers, unsuited
from tritonhybrid.containers.probe import Verdict, probe
from tritonhybrid.containers.rope import long_rope
from tritonhybrid.decoding_loop import DecodingLoop
from tritonhybrid.errors import ConfigError, KernelArgumentError, explain
from tritonhybrid.hf_loop import refusing_lost_prefix, run_hf_loop
from tritonhybrid.kv_cache import PagedKVCache
from tritonhybrid.long_rope import LongRope
from tritonhybrid.replay_state import ReplayState
from tritonhybrid.rollout_output import PausedRollout
from tritonhybrid.runner import Runner
from tritonhybrid.scheduler import Scheduler, SchedulerOptions
from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import RolloutStats
from tritonhybrid.weights.checksum import checksum
from tritonhybrid.weights.source import Materialisation, WeightSource
from tritonhybrid_kernels.launch import is_interpreted
from tritonhybrid_kernels.ops import Ops, select_ops

logger = logging.getLogger("tritonhybrid")

_MAX_VERDICTS = 64


@dataclass(frozen=True)
class _Pause:
    """A paused rollout whose pages are still in the cache."""

    rollout: PausedRollout
    scheduler: Scheduler


class Generation:
    """Serves sequences from one module's weights, call after call.

    Keeps what outlives a call: the cache, the probe's verdicts, the operations.

    Args:
        module: The module DeepSpeed trains.
        source: Makes its parameters whole.
        config: Settings.
        tokenizer: For stop strings and text; may be None.
    """

    def __init__(
        self, module: nn.Module, source: WeightSource, config: HybridConfig, tokenizer: Any
    ) -> None:
        self.module = module
        self.source = source
        self.config = config
        self.tokenizer = tokenizer
        self._pool = CachePool(config)
        self.replays = ReplayState(config, self.device)
        self._pause: _Pause | None = None
        # What the pages were computed with.
        self._weights: Hashable = None
        self._verdicts: dict[Hashable, Verdict] = {}
        self._ops: dict[str, Ops] = {}
        self._announced: set[str] = set()
        self.ops_override: Ops | None = None

    @staticmethod
    def around_decode() -> AbstractContextManager[None]:
        """Entered around the device's part of each decode step; a recorder shadows it."""
        return nullcontext()

    @property
    def cache(self) -> PagedKVCache | None:
        """The pages kept for the next call."""
        return self._pool.cache

    @property
    def blocks(self) -> BlockManager | None:
        """Who owns them."""
        return self._pool.blocks

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.module.parameters()).device

    def ops(self) -> Ops:
        """The operations of this call's device, or a recorder's."""
        if self.ops_override is not None:
            return self.ops_override
        backend = self.config.backend
        if backend == "auto":
            is_triton = self.device.type == "cuda" or is_interpreted()
            backend = "triton" if is_triton else "torch"
        if backend not in self._ops:
            if backend == "triton" and self.device.type != "cuda" and not is_interpreted():
                raise ConfigError(
                    explain(
                        "HybridConfig.backend 'triton' needs a CUDA device or Triton's interpreter",
                        expected="parameters on cuda, or TRITON_INTERPRET=1 from the start",
                        got=f"parameters on {self.device.type}",
                        hint='Set backend to "auto" or "torch".',
                    )
                )
            try:
                self._ops[backend] = select_ops(backend, frozenset(self.config.torch_ops))
            except KernelArgumentError as error:
                raise ConfigError(f"HybridConfig.torch_ops: {error}") from error
        return self._ops[backend]

    def release(self) -> None:
        """Give the cache and the arena back; a paused rollout will be computed anew."""
        self._drop_pages()
        self.source.release()

    def forget(self) -> None:
        """Use no page for another call: the weights have changed."""
        self._weights = None

    def abandon(self, call: Call) -> None:
        """Free the pages of what a call has paused that fails in the end."""
        if self._pause is not None and self._pause.rollout is call.paused:
            self._pause.scheduler.set_back()
            self._pause = None

    def run(
        self,
        sequences: Sized[Sequence],
        call: Call,
        hf_decoding: Callable[[], Any] | None = None,
        *,
        is_padded: bool = False,
    ) -> Any:
        """Do at once what :meth:`serve` does step by step.

        Returns:
            What ``hf_decoding`` returned, if it ran; else None.
        """
        serving = self.serve(sequences, call, hf_decoding, is_padded=is_padded)
        while True:
            try:
                next(serving)
            except StopIteration as end:
                return end.value

    def serve(
        self,
        sequences: Sized[Sequence],
        call: Call,
        hf_decoding: Callable[[], Any] | None = None,
        *,
        is_padded: bool = False,
    ) -> Generator[list[Sequence], None, Any]:
        """Sample every sequence to its end or the budget's; they are filled in place.

        To be run to its end: the module is in our hands until then. A caller that wants no
        more of it says so in ``call``.

        Args:
            sequences: Checked already; may be empty where other ranks have some.
            call: Its stats are filled.
            hf_decoding: Runs in place of our sampling where HF's own loop must serve the
                model; the sequences then stay as they are.
            is_padded: Whether the prompts are rows of one padded batch, served as such.

        Yields:
            Sequences as they end.

        Returns:
            What ``hf_decoding`` returned, if it ran; else None.

        Raises:
            CacheExhaustedError: A sequence can't fit the cache.
            NonFiniteLogitsError: The model gave NaN.
            RankFailureError: Another rank failed.
        """
        parts = find_parts(self.module)
        stats = call.stats
        call.tell_sequences(sequences)
        with self._materialised(parts, call) as weights:
            if weights.strategy == "foreign":
                stats.note(
                    "the caller has gathered the weights, at addresses that change each call; "
                    "ds3_gather_for_generation=False lets this engine gather into its own arena"
                )
            if not sequences:
                return None
            self._announce_modes(weights, stats)
            return (yield from self._serve(parts, sequences, call, hf_decoding, is_padded))

    def run_hf_decoding(self, reason: str, decode: Callable[[], Any], call: Call) -> Any:
        """Run one of HF's own decodings over whole weights.

        Args:
            reason: What our loop doesn't serve.
            decode: HF's decoding, arguments bound.
            call: Its stats are filled.

        Returns:
            What ``decode`` returns.
        """
        parts = find_parts(self.module)
        stats = call.stats
        with self._materialised(parts, call) as weights:
            stats.path, stats.backend, stats.sampler = "hf", "torch", "hf"
            stats.graph_reason = "HF's own decoding serves this call"
            self._announce(stats, f"HF's own decoding serves this call: {reason}")
            self._announce_modes(weights, stats)
            return self._with_hf_generate(decode, call)

    @contextmanager
    def _materialised(self, parts: ModelParts | None, call: Call) -> Iterator[Materialisation]:
        """Whole weights for a call; the ranks meet before and after they are gathered."""
        layers = parts.layers if parts else ()
        # What is laid out anew is laid out as the containers like it best.
        groups = neighbours(layers) if self.source.is_partitioned else ()
        with self.source.materialised(layers, groups, call.collective.meet) as weights:
            call.interrupts.deliver()
            call.stats.strategy = weights.strategy
            call.stats.gather_s = weights.gather_s
            call.stats.gather_bytes = weights.gather_bytes
            call.stats.extra_weight_bytes = weights.extra_bytes
            if weights.strategy == "pinned":
                start, seconds = weights.gather_start_s, weights.gather_s
                call.tell_span("gather", "call", start, seconds, bytes=weights.gather_bytes)
            yield weights

    def _announce_modes(self, weights: Materialisation, stats: RolloutStats) -> None:
        """Say what the call has off that was on around it."""
        if weights.autocast_dtype is not None:
            self._announce(
                stats,
                f"autocast to {weights.autocast_dtype} is off inside the call: it computes in "
                f"the weights' {causal_model(self.module).dtype}",
            )
        if weights.was_training:
            self._announce(
                stats,
                "called in training mode: dropout is off and gradient checkpointing inert "
                "for the call; modes were put back",
            )

    def _with_hf_generate(self, decode: Callable[[], Any], call: Call) -> Any:
        """Decode while the module's generate is HF's: assisted decodings call it again."""
        patches = Patches()
        start = time.perf_counter()
        try:
            patches.set(self.module, "generate", own_generate(self.module))
            with refusing_lost_prefix():
                return call.interrupts.let_through(decode)
        finally:
            call.stats.decode_s = time.perf_counter() - start
            patches.undo()
            call.tell_span("hf decoding", "steps", start, call.stats.decode_s)

    def _serve(
        self,
        parts: ModelParts | None,
        sequences: Sized[Sequence],
        call: Call,
        hf_decoding: Callable[[], Any] | None,
        is_padded: bool,
    ) -> Generator[list[Sequence], None, Any]:
        stats = call.stats
        max_length = max(sequence.max_length for sequence in sequences)
        start = time.perf_counter()
        shortest = min(len(s.prompt) for s in sequences) if is_padded else None
        verdict, reason = self._judge(parts, max_length, shortest, call)
        call.interrupts.deliver()
        stats.bind_s = time.perf_counter() - start
        call.tell_span("bind", "call", start, stats.bind_s)
        stats.backend = self.ops().backend
        if parts is None or verdict is None or not verdict.is_native:
            self._announce(stats, f"HF's own loop serves this model: {reason}")
            stats.path, stats.sampler = "hf", "inverse_cdf"
            stats.graph_reason = "HF's own loop serves this model"
            stats.layer_paths = {f"hf: {reason}": len(parts.layers) if parts else 1}
            if hf_decoding is not None:
                stats.sampler = "hf"
                return self._with_hf_generate(hf_decoding, call)
            call.interrupts.let_through(
                partial(run_hf_loop, self.module, sequences, self.ops(), call, self.finish_text)
            )
            left = [sequence for sequence in sequences if not sequence.is_finished]
            call.paused = PausedRollout(left, owner=self) if left else None
            yield [sequence for sequence in sequences if sequence.is_finished]
            return None
        for note in verdict.notes:
            self._announce(stats, note)
        stats.layer_paths = count_paths(list(verdict.plans))
        yield from self._serve_natively(parts, verdict, sequences, max_length, call)
        return None

    def _judge(
        self, parts: ModelParts | None, max_length: int, shortest: int | None, call: Call
    ) -> tuple[Verdict | None, str]:
        """The probe's verdict on the model as it is now; asked once a structure."""
        if parts is None:
            return None, "it is not built around a list of decoder layers"
        reason = unsuited(parts, max_length, shortest)
        if reason is not None:
            return None, reason
        plans = plan_layers(parts)
        ops = self.ops()
        key = (fingerprint(parts, plans), ops.backend)
        verdict = self._verdicts.get(key)
        if verdict is None:
            start = time.perf_counter()
            verdict = probe(parts, plans, ops)
            call.tell_span("probe", "call", start)
            if verdict.is_lasting:
                # Hooks that come and go with each call make new keys without end.
                if len(self._verdicts) >= _MAX_VERDICTS:
                    self._verdicts.clear()
                self._verdicts[key] = verdict
        return verdict, "; ".join(verdict.notes)

    def _serve_natively(
        self,
        parts: ModelParts,
        verdict: Verdict,
        sequences: Sized[Sequence],
        max_length: int,
        call: Call,
    ) -> Iterator[list[Sequence]]:
        stats = call.stats
        start = time.perf_counter()
        rope = long_rope(parts, max_length)
        try:
            scheduler, cache = self._scheduled(verdict, sequences, rope, call)
            stats.kv_bytes = cache.num_bytes
            replays = self.replays
            structure = verdict if verdict.is_lasting else None
            replays.consider(stats.strategy, structure, self.ops())
            binding = Binding(
                parts,
                verdict.plans,
                self.ops(),
                cache,
                max_length=max_length,
                long_rope=rope,
                returns_tuple=verdict.returns_tuple,
                fixed=replays.fixed,
            )
            stats.path = "fused" if binding.is_fused else "generic"
            with binding:
                num_seqs = min(scheduler.options.max_num_seqs, len(sequences))
                max_blocks = scheduler.blocks.blocks_for(max_length)
                runner = Runner(
                    binding,
                    cache,
                    replays.memory(binding, cache, num_seqs, max_blocks),
                    max_num_seqs=num_seqs,
                    device=self.device,
                    graphs=replays.graphs,
                    around_decode=self.around_decode,
                )
                replays.begin(runner, binding, cache, num_seqs)
                num_steps = replays.num_steps(binding)
                scheduler.options = replace(scheduler.options, num_steps=num_steps)
                seconds = time.perf_counter() - start
                stats.bind_s += seconds
                call.tell_span("bind", "call", start, seconds)
                yield from DecodingLoop(scheduler, runner, call, self.finish_text).run()
                replays.end(stats, runner.host_rules)
        except BaseException:
            # What a broken step left in the pages (NaN, perhaps) or half done in the tables
            # must not meet a later one.
            paused = self._pause.rollout.sequences if self._pause is not None else []
            for sequence in (*sequences, *paused):
                sequence.block_table = []
            self._drop_memory()
            raise
        left = [sequence for sequence in sequences if not sequence.is_finished]
        if left:
            call.paused = PausedRollout(left, owner=self)
            self._pause = _Pause(call.paused, scheduler)
        scheduler.blocks.check_integrity([sequence.block_table for sequence in left])
        if rope is not None and any(rope.changed_under(s) and s.logprobs for s in sequences):
            self._announce(
                stats,
                f"a sequence outgrew longrope's {rope.original} positions while it was sampled; as "
                "in HF's generate its log-probabilities are not those of one forward over it all",
            )

    def _scheduled(
        self,
        verdict: Verdict,
        sequences: Sized[Sequence],
        rope: LongRope | None,
        call: Call,
    ) -> tuple[Scheduler, PagedKVCache]:
        """The sequences in a scheduler, over a cache whose pages hold nothing out of date."""
        config = self.config
        shares = config.enable_prefix_caching and rope is None
        keeps = shares or self._pause is not None or call.token_budget is not None
        # A verdict is one object as long as the model's structure and hooks stay the same.
        weights = (checksum(self.module), id(verdict)) if keeps and verdict.is_lasting else None
        is_current = weights is not None and weights == self._weights
        self._weights = weights
        pause, self._pause = self._pause, None
        order = sequences
        if pause is not None:
            if pause.rollout is call.resumed and is_current and self.cache is not None:
                return pause.scheduler, self.cache
            # Another call has need of the pages, or what they hold is out of date.
            pause.scheduler.set_back()
            if pause.rollout is call.resumed:
                order = list(pause.scheduler.waiting)
        if self.blocks is not None and not is_current:
            self.blocks.forget()
        dtype = causal_model(self.module).dtype
        cache, blocks = self._pool.acquire(verdict.geometry, sequences, dtype, self.device, rope)
        scheduler = Scheduler(
            blocks,
            SchedulerOptions(
                max_num_seqs=min(config.max_num_seqs, call.max_num_seqs or config.max_num_seqs),
                max_num_batched_tokens=config.max_num_batched_tokens,
                has_chunks=config.enable_chunked_prefill,
                is_mixed=config.enable_mixed_steps,
                is_longest_first=config.scheduling_policy == "longest_first",
                shares_prefixes=shares,
                recompute_at=rope.recompute_at if rope is not None else None,
            ),
        )
        scheduler.add(order)
        return scheduler, cache

    def _drop_pages(self) -> None:
        """Give every page up; what is paused will be computed anew."""
        if self._pause is not None:
            self._pause.scheduler.set_back()
        self._drop_memory()

    def _drop_memory(self) -> None:
        self._pause = None
        self._pool.release()
        self.replays.release()

    def finish_text(self, sequence: Sequence) -> None:
        """End a sequence whose text holds a stop string; the text is cut before it."""
        sequence.notice_stop_strings(self.tokenizer)

    def _announce(self, stats: RolloutStats, text: str) -> None:
        """Say a decision once in the log and always in the call's stats."""
        stats.note(text)
        if text not in self._announced:
            self._announced.add(text)
            logger.warning("tritonhybrid: %s", text)
