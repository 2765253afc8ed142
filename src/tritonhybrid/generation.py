"""The loop: schedule, execute, record, until every sequence has ended."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Sequence as Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritonhybrid.block_manager import BlockManager
from tritonhybrid.call import Call
from tritonhybrid.config import HybridConfig
from tritonhybrid.containers.binding import Binding
from tritonhybrid.containers.joined import neighbours
from tritonhybrid.containers.parts import ModelParts, causal_model, find_parts, own_generate
from tritonhybrid.containers.patches import Patches
from tritonhybrid.containers.plan import count_paths, fingerprint, plan_layers, unsuited
from tritonhybrid.containers.probe import Verdict, probe
from tritonhybrid.containers.rope import long_rope
from tritonhybrid.errors import CacheExhaustedError, ConfigError, KernelArgumentError, explain
from tritonhybrid.hf_loop import refusing_lost_prefix, run_hf_loop
from tritonhybrid.kv_cache import LayerGeometry, PagedKVCache, bytes_per_block
from tritonhybrid.long_rope import LongRope
from tritonhybrid.runner import Runner
from tritonhybrid.scheduler import Scheduler
from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import RolloutStats
from tritonhybrid.weights.source import Materialisation, WeightSource
from tritonhybrid_kernels.launch import is_interpreted
from tritonhybrid_kernels.ops import Ops, select_ops

logger = logging.getLogger("tritonhybrid")

DEFAULT_BLOCK_SIZE = 64
_MAX_VERDICTS = 64


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
        self.cache: PagedKVCache | None = None
        self.blocks: BlockManager | None = None
        self._verdicts: dict[Hashable, Verdict] = {}
        self._ops: dict[str, Ops] = {}
        self._announced: set[str] = set()
        self.ops_override: Ops | None = None

    @staticmethod
    def around_decode() -> AbstractContextManager[None]:
        """Entered around the device's part of each decode step; a recorder shadows it."""
        return nullcontext()

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
        """Give the cache and the arena back."""
        self.cache = None
        self.blocks = None
        self.source.release()

    def run(
        self,
        sequences: Sized[Sequence],
        call: Call,
        hf_decoding: Callable[[], Any] | None = None,
        *,
        is_padded: bool = False,
    ) -> Any:
        """Sample every sequence to its end; they are filled in place.

        Args:
            sequences: Checked already; may be empty where other ranks have some.
            call: Its stats are filled.
            hf_decoding: Runs in place of our sampling where HF's own loop must serve the
                model; the sequences then stay as they are.
            is_padded: Whether the prompts are rows of one padded batch, served as such.

        Returns:
            What ``hf_decoding`` returned, if it ran; else None.

        Raises:
            CacheExhaustedError: A sequence can't fit the cache.
            NonFiniteLogitsError: The model gave NaN.
            RankFailureError: Another rank failed.
        """
        parts = find_parts(self.module)
        stats = call.stats
        with self._materialised(parts, call) as weights:
            if weights.strategy == "foreign":
                stats.note(
                    "the caller has gathered the weights, at addresses that change each call; "
                    "ds3_gather_for_generation=False lets this engine gather into its own arena"
                )
            if weights.autocast_dtype is not None:
                self._announce(
                    stats,
                    f"autocast to {weights.autocast_dtype} is off inside the call: it computes in "
                    f"the weights' {causal_model(self.module).dtype}",
                )
            if weights.was_training and sequences:
                self._announce(
                    stats,
                    "called in training mode: dropout is off and gradient checkpointing inert "
                    "for the call; modes were put back",
                )
            if not sequences:
                return None
            return self._serve(parts, sequences, call, hf_decoding, is_padded=is_padded)

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
        with self._materialised(parts, call):
            stats.path, stats.backend, stats.sampler = "hf", "torch", "hf"
            self._announce(stats, f"HF's own decoding serves this call: {reason}")
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
            yield weights

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

    def _serve(
        self,
        parts: ModelParts | None,
        sequences: Sized[Sequence],
        call: Call,
        hf_decoding: Callable[[], Any] | None,
        *,
        is_padded: bool,
    ) -> Any:
        stats = call.stats
        max_length = max(sequence.max_length for sequence in sequences)
        start = time.perf_counter()
        shortest = min(len(s.prompt) for s in sequences) if is_padded else None
        verdict, reason = self._judge(parts, max_length, shortest)
        call.interrupts.deliver()
        stats.bind_s = time.perf_counter() - start
        stats.backend = self.ops().backend
        if parts is None or verdict is None or not verdict.is_native:
            self._announce(stats, f"HF's own loop serves this model: {reason}")
            stats.path, stats.sampler = "hf", "inverse_cdf"
            stats.layer_paths = {f"hf: {reason}": len(parts.layers) if parts else 1}
            if hf_decoding is not None:
                stats.sampler = "hf"
                return self._with_hf_generate(hf_decoding, call)
            call.interrupts.let_through(
                partial(run_hf_loop, self.module, sequences, self.ops(), stats, self.finish_text)
            )
            return None
        for note in verdict.notes:
            self._announce(stats, note)
        stats.layer_paths = count_paths(list(verdict.plans))
        self._serve_natively(parts, verdict, sequences, max_length, call)
        return None

    def _judge(
        self, parts: ModelParts | None, max_length: int, shortest: int | None
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
            verdict = probe(parts, plans, ops)
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
    ) -> None:
        stats = call.stats
        start = time.perf_counter()
        rope = long_rope(parts, max_length)
        cache, blocks = self._cache_for(verdict.geometry, sequences, rope)
        stats.kv_bytes = cache.num_bytes
        scheduler = Scheduler(
            blocks,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            recompute_at=rope.recompute_at if rope is not None else None,
        )
        binding = Binding(
            parts,
            verdict.plans,
            self.ops(),
            cache,
            max_length=max_length,
            long_rope=rope,
            returns_tuple=verdict.returns_tuple,
        )
        stats.path = "fused" if binding.is_fused else "generic"
        try:
            scheduler.add(sequences)
            with binding:
                runner = Runner(
                    binding,
                    cache,
                    max_num_seqs=min(self.config.max_num_seqs, len(sequences)),
                    max_blocks=blocks.blocks_for(max_length),
                    device=self.device,
                    long_rope=rope,
                    around_decode=self.around_decode,
                )
                stats.bind_s += time.perf_counter() - start
                self._loop(scheduler, runner, call)
        except BaseException:
            # What a broken step left in the pages (NaN, perhaps) or half done in the tables
            # must not meet a later one.
            self.cache = None
            self.blocks = None
            raise
        blocks.check_integrity([])
        stats.preemptions = scheduler.preemptions
        if rope is not None and any(rope.changed_under(s) and s.logprobs for s in sequences):
            self._announce(
                stats,
                f"a sequence outgrew longrope's {rope.original} positions while it was sampled; as "
                "in HF's generate its log-probabilities are not those of one forward over it all",
            )

    def _loop(self, scheduler: Scheduler, runner: Runner, call: Call) -> None:
        stats = call.stats
        while scheduler.has_work:
            start = time.perf_counter()
            step = scheduler.schedule()
            # The one part that takes long; what it leaves half done is given up with the cache.
            sequences, sampled = call.interrupts.let_through(partial(runner.execute, step))
            for row, sequence in enumerate(sequences):
                sequence.append(*sampled.row(row))
                self.finish_text(sequence)
            stats.peak_blocks = max(stats.peak_blocks, scheduler.blocks.num_used)
            scheduler.retire()
            seconds = time.perf_counter() - start
            if step.decode:
                stats.decode_s += seconds
                stats.num_decode_steps += 1
            else:
                stats.prefill_s += seconds
                stats.num_prefill_steps += 1
                stats.prefill_tokens += sum(len(g.leader) - 1 for g in step.prefill)
        stats.sampler = "+".join(sorted(runner.sampler.used))

    def finish_text(self, sequence: Sequence) -> None:
        """End a sequence whose text holds a stop string; the text is cut before it."""
        sequence.notice_stop_strings(self.tokenizer)

    def _cache_for(
        self, geometry: Sized[LayerGeometry], sequences: Sized[Sequence], rope: LongRope | None
    ) -> tuple[PagedKVCache, BlockManager]:
        """The kept cache if it is large enough, else a new one within the budget."""
        size = self.config.block_size
        block_size = DEFAULT_BLOCK_SIZE if size == "auto" else size
        dtype = causal_model(self.module).dtype
        per_block = bytes_per_block(geometry, block_size, dtype)
        budget = self.config.kv_cache_bytes
        if budget == "auto":
            budget = _free_bytes(self.device) // 2
        most = budget // per_block
        if most < 1:
            raise CacheExhaustedError(
                explain(
                    "The key-value cache needs at least one page",
                    expected=f"kv_cache_bytes >= {per_block}",
                    got=budget,
                    hint="Raise kv_cache_bytes or lower block_size.",
                )
            )
        wanted = min(most, _blocks_wanted(sequences, block_size, self.config.max_num_seqs, rope))
        if self.cache is None or not self.cache.fits(geometry, wanted, block_size):
            self.cache = None
            self.cache = PagedKVCache(geometry, wanted, block_size, dtype, self.device)
            self.blocks = BlockManager(wanted, block_size)
        assert self.blocks is not None
        return self.cache, self.blocks

    def _announce(self, stats: RolloutStats, text: str) -> None:
        """Say a decision once in the log and always in the call's stats."""
        stats.note(text)
        if text not in self._announced:
            self._announced.add(text)
            logger.warning("tritonhybrid: %s", text)


def _blocks_wanted(
    sequences: Sized[Sequence], block_size: int, max_num_seqs: int, rope: LongRope | None
) -> int:
    """Pages with which no sequence in flight ever waits: prompts shared, tails own."""
    seen: set[int] = set()
    needs = []
    for sequence in sequences:
        total = -(-sequence.max_length // block_size)
        shared = len(sequence.prompt) // block_size
        if rope is not None and rope.starts_anew:
            # What a sequence recomputes is its own.
            shared = 0
        # One page more: the copy of a shared last page exists beside the original.
        needs.append(total - shared + 1 if sequence.prompt_key in seen else total + 1)
        seen.add(sequence.prompt_key)
    needs.sort(reverse=True)
    return sum(needs[:max_num_seqs])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # sysconf's free pages leave out the file cache, which gives way; the kernel's own estimate
    # counts it.
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
