"""Which sequences run in the next step: continuous batching without torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tritonhybrid.block_manager import BlockCopy, BlockManager
from tritonhybrid.errors import CacheExhaustedError, explain
from tritonhybrid.sequence import Sequence


@dataclass
class PrefillGroup:
    """Sequences with one and the same token history, computed once.

    The leader's pages hold the history; the followers share them.
    """

    leader: Sequence
    followers: list[Sequence] = field(default_factory=list)

    @property
    def members(self) -> list[Sequence]:
        """Leader first."""
        return [self.leader, *self.followers]


@dataclass
class Step:
    """What the next forward computes: prompts, or one token for each running sequence."""

    prefill: list[PrefillGroup] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)


class Scheduler:
    """First come, first served; prompt steps and decode steps alternate as slots allow.

    A running sequence that finds no page sets the latest arrival back (it is
    recomputed later); nothing is dropped or shortened. Same input, same order.

    Args:
        blocks: The cache's pages.
        max_num_seqs: Most sequences in flight.
        max_num_batched_tokens: Most tokens in a prompt step; a longer prompt runs alone.
        recompute_at: Length at which the pages of a sequence are void and it is recomputed.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        recompute_at: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.recompute_at = recompute_at
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences behind those that wait.

        Raises:
            CacheExhaustedError: One could not finish even alone; none was queued.
        """
        sequences = list(sequences)
        for sequence in sequences:
            # The last sampled token is never written to the cache.
            need = self.blocks.blocks_for(max(sequence.max_length - 1, 1))
            if need > self.blocks.num_blocks:
                raise CacheExhaustedError(
                    explain(
                        "A sequence must fit the key-value cache",
                        expected=f"at most {self.blocks.capacity} tokens",
                        got=f"prompt {len(sequence.prompt)} + max_new_tokens "
                        f"{sequence.params.max_new_tokens} (prompt {sequence.prompt_index})",
                        hint="Raise kv_cache_bytes, or lower max_new_tokens.",
                    )
                )
        self.waiting.extend(sequences)

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.waiting or self.running)

    def schedule(self) -> Step:
        """Choose the next step and give its sequences their pages."""
        self._set_back_outgrown()
        if self._is_time_to_refill():
            groups = self._admit()
            if groups:
                return Step(prefill=groups)
        return self._decode()

    def retire(self) -> list[Sequence]:
        """Take finished sequences out and free their pages."""
        finished = [sequence for sequence in self.running if sequence.is_finished]
        if finished:
            self.running = [sequence for sequence in self.running if not sequence.is_finished]
            for sequence in finished:
                self.blocks.free(sequence.block_table)
        return finished

    def clear(self) -> None:
        """Drop all work and free every page (an error or Ctrl-C ended the call)."""
        for sequence in (*self.waiting, *self.running):
            self.blocks.free(sequence.block_table)
        self.waiting.clear()
        self.running.clear()

    def _set_back_outgrown(self) -> None:
        """Free the void pages of running sequences, and queue these first, in their order."""
        if self.recompute_at is None:
            return
        outgrown = [s for s in self.running if len(s) == self.recompute_at]
        if outgrown:
            self.running = [s for s in self.running if len(s) != self.recompute_at]
            for sequence in reversed(outgrown):
                self.blocks.free(sequence.block_table)
                self.waiting.appendleft(sequence)

    def _is_time_to_refill(self) -> bool:
        if not self.waiting:
            return False
        # A prompt step stalls all who decode, so it waits for an eighth of the slots.
        slots = self.max_num_seqs - len(self.running)
        return slots >= min(len(self.waiting), max(1, self.max_num_seqs // 8))

    def _admit(self) -> list[PrefillGroup]:
        groups: list[PrefillGroup] = []
        tokens = 0
        slots = self.max_num_seqs - len(self.running)
        # Each running sequence may need a page in the next decode step.
        spare = self.blocks.num_free - len(self.running)
        while self.waiting and slots > 0:
            sequence = self.waiting[0]
            group = groups[-1] if groups else None
            if group is not None and _continues(group.leader, sequence):
                # A follower soon needs a page of its own: the copy of the last shared one.
                if spare < 1:
                    break
                spare -= 1
                group.followers.append(sequence)
                sequence.block_table = self.blocks.share(group.leader.block_table)
            else:
                need = self.blocks.blocks_for(len(sequence))
                # The page its first decode step may open is kept back too.
                reserve = 1 if self.running or groups else 0
                over = groups and tokens + len(sequence) > self.max_num_batched_tokens
                if over or need + reserve > spare:
                    break
                sequence.block_table = self.blocks.allocate(need, room=self._room(sequence))
                spare -= need + reserve
                tokens += len(sequence)
                groups.append(PrefillGroup(sequence))
            self.waiting.popleft()
            self.running.append(sequence)
            slots -= 1
        return groups

    def _decode(self) -> Step:
        step = Step()
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            position = len(sequence) - 1
            while not self.blocks.can_allocate(
                self.blocks.append_cost(sequence.block_table, position)
            ):
                self._preempt(self.running.pop())
                if index >= len(self.running):
                    break
            else:
                copy = self.blocks.append(sequence.block_table, position, room=self._room(sequence))
                if copy is not None:
                    step.copies.append(copy)
                step.decode.append(sequence)
                index += 1
        assert step.decode, "add() admits only sequences that can finish alone"
        return step

    def _room(self, sequence: Sequence) -> int:
        """Pages the sequence fills when it samples all it may (the last token is not kept)."""
        return self.blocks.blocks_for(max(sequence.max_length - 1, 1))

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        self.waiting.appendleft(sequence)
        self.preemptions += 1


def _continues(leader: Sequence, sequence: Sequence) -> bool:
    """Whether both have the same history, so that one prefill serves both."""
    return sequence.prompt_key == leader.prompt_key and not sequence.output and not leader.output
