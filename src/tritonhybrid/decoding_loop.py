"""The loop: schedule, execute, record, until every sequence has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from tritonhybrid.call import Call
from tritonhybrid.call_observer import StepReport
from tritonhybrid.runner import Runner
from tritonhybrid.sampler import Sampled
from tritonhybrid.scheduler import Scheduler, Step
from tritonhybrid.sequence import Sequence


class DecodingLoop:
    """Runs a scheduler's steps and keeps the call's account of them.

    Args:
        scheduler: Holds the sequences.
        runner: Over the bound model.
        call: Its stats are filled; its budget and its aborts are heeded.
        finish_text: Ends a sequence whose text holds a stop string.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        call: Call,
        finish_text: Callable[[Sequence], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._call = call
        self._finish_text = finish_text

    def run(self) -> Iterator[list[Sequence]]:
        """Step until every sequence has ended, the budget is spent or the caller gives up.

        Yields:
            Sequences that ended or were aborted; what is left stays in the scheduler.
        """
        scheduler, call, stats = self._scheduler, self._call, self._call.stats
        preemptions, shared = scheduler.preemptions, scheduler.num_shared_tokens
        evicted = scheduler.blocks.num_evicted
        while scheduler.has_work and not call.is_spent:
            start, num_set_back = time.perf_counter(), scheduler.preemptions
            step = scheduler.schedule()
            sampled = step.sampled
            # The one part that takes long; what it leaves half done is given up with the cache.
            results = call.interrupts.let_through(partial(self._runner.execute, step))
            num_kept = self._record(sampled, results)
            num_used, num_shared = scheduler.blocks.num_used, scheduler.blocks.num_shared
            stats.peak_blocks = max(stats.peak_blocks, num_used)
            stats.shared_blocks = max(stats.shared_blocks, num_shared)
            finished = scheduler.retire()
            seconds = time.perf_counter() - start
            self._account(step, num_kept, seconds)
            if call.observers:
                report = StepReport(
                    start_s=start,
                    seconds=seconds,
                    num_prompts=len(step.prefill),
                    num_decoding=len(step.decode),
                    num_steps=step.num_steps,
                    prefill_tokens=sum(group.num_tokens for group in step.prefill),
                    decode_tokens=len(step.decode) if step.prefill else num_kept,
                    kept_tokens=num_kept,
                    overrun_tokens=len(results) * len(sampled) - num_kept,
                    used_blocks=num_used,
                    shared_blocks=num_shared,
                    preemptions=scheduler.preemptions - num_set_back,
                )
                for observer in call.observers:
                    observer.on_step(report)
            call.tell_finished(finished)
            if finished:
                yield finished
            finished = self._aborted()
            call.tell_finished(finished)
            if finished:
                yield finished
        stats.preemptions = scheduler.preemptions - preemptions
        stats.shared_tokens = scheduler.num_shared_tokens - shared
        stats.evicted_blocks = scheduler.blocks.num_evicted - evicted
        stats.sampler = "+".join(sorted(self._runner.sampler.used))

    def _record(self, sequences: list[Sequence], results: list[Sampled]) -> int:
        """Give each sequence its tokens up to its end; returns how many were kept."""
        num_kept = 0
        for result in results:
            for row, sequence in enumerate(sequences):
                if sequence.is_finished:
                    continue
                sequence.append(*result.row(row))
                self._finish_text(sequence)
                num_kept += 1
        self._call.num_sampled += num_kept
        self._call.stats.overrun_tokens += len(results) * len(sequences) - num_kept
        return num_kept

    def _account(self, step: Step, num_kept: int, seconds: float) -> None:
        stats = self._call.stats
        if step.prefill:
            stats.prefill_s += seconds
            stats.num_prefill_steps += 1
            stats.prefill_tokens += sum(group.num_tokens for group in step.prefill)
            stats.decode_tokens += len(step.decode)
            stats.mixed_decode_tokens += len(step.decode)
        else:
            stats.decode_s += seconds
            stats.num_decode_steps += step.num_steps
            stats.decode_tokens += num_kept

    def _aborted(self) -> list[Sequence]:
        """End what the caller has given up since the last look."""
        call, scheduler = self._call, self._scheduler
        if call.is_given_up:
            call.aborts += {s.prompt_index for s in (*scheduler.in_flight, *scheduler.waiting)}
        aborted = [s for index in call.aborts for s in scheduler.abort(index)]
        call.aborts.clear()
        return aborted
