"""Which sequences run in the next step: continuous batching without torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tritonhybrid.block_manager import BlockCopy, BlockManager, Match, PageTrail
from tritonhybrid.errors import CacheExhaustedError, explain
from tritonhybrid.sequence import Sequence


@dataclass
class PrefillGroup:
    """Sequences with one and the same token history, computed once.

    The leader's pages hold the history; the followers share them.

    Args:
        leader: Whose tokens are computed.
        followers: They take part in the last chunk only.
        start: First token to compute; those before it are in the pages already.
        stop: One past the last token to compute; None computes all.
    """

    leader: Sequence
    followers: list[Sequence] = field(default_factory=list)
    start: int = 0
    stop: int | None = None

    @property
    def members(self) -> list[Sequence]:
        """Leader first."""
        return [self.leader, *self.followers]

    @property
    def end(self) -> int:
        """One past the last token to compute."""
        return len(self.leader) if self.stop is None else self.stop

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return self.end - self.start

    @property
    def is_complete(self) -> bool:
        """Whether the history ends with this chunk, so that a token can be sampled."""
        return self.end == len(self.leader)


@dataclass
class Step:
    """What the next forward computes.

    Args:
        prefill: Chunks of prompts.
        decode: Sequences that get their next tokens; with ``prefill`` in a mixed step.
        copies: To carry out before anything is written.
        num_steps: Tokens to sample for each of ``decode``, one after the other; the pages
            for all of them are in the tables.
    """

    prefill: list[PrefillGroup] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    num_steps: int = 1

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order of their rows."""
        complete = [group for group in self.prefill if group.is_complete]
        return [*self.decode, *(member for group in complete for member in group.members)]


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """How a scheduler makes its choices.

    Args:
        max_num_seqs: Most sequences in flight.
        max_num_batched_tokens: Most tokens of a prompt step.
        has_chunks: Whether a longer prompt is computed in chunks of so many; else it runs
            alone, in one step.
        is_mixed: Whether a step takes prompts and running sequences together; else they
            alternate.
        is_longest_first: Whether the sequences that may grow longest go first, so that they
            don't run on alone at the end; else the order is the caller's.
        shares_prefixes: Whether full pages serve every sequence that begins with their tokens.
        recompute_at: Length at which the pages of a sequence are void and it is recomputed.
        num_steps: Most tokens to sample for a sequence between two looks at the host.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    has_chunks: bool = False
    is_mixed: bool = False
    is_longest_first: bool = False
    shares_prefixes: bool = True
    recompute_at: int | None = None
    num_steps: int = 1


class Scheduler:
    """First come, first served; prompt steps and decode steps alternate as slots allow.

    A running sequence that finds no page sets the latest arrival back (it is
    recomputed later); nothing is dropped or shortened. Same input, same order.

    Args:
        blocks: The cache's pages.
        options: How to choose.
    """

    def __init__(self, blocks: BlockManager, options: SchedulerOptions) -> None:
        self.blocks = blocks
        self.options = options
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.num_shared_tokens = 0
        # What a sequence wrote before it outgrew its pages is void for longer ones.
        self._shares_prefixes = options.shares_prefixes and options.recompute_at is None
        # The latest arrival, where its prompt is not computed to its end yet.
        self._partial: PrefillGroup | None = None
        self._trails: dict[Sequence, PageTrail] = {}

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
        if self.options.is_longest_first:
            # Stable: samples of a prompt stay together.
            sequences.sort(key=lambda s: s.max_length, reverse=True)
        self.waiting.extend(sequences)

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.waiting or self.running or self._partial)

    @property
    def in_flight(self) -> list[Sequence]:
        """Sequences with pages, the earliest arrival first."""
        return self.running if self._partial is None else [*self.running, self._partial.leader]

    def schedule(self) -> Step:
        """Choose the next step and give its sequences their pages."""
        self._set_back_outgrown()
        if self.options.is_mixed:
            step = self._decode() if self.running else Step()
            step.prefill = self._admit(self.options.max_num_batched_tokens - len(step.decode))
            if step.prefill:
                step.num_steps = 1
            return step
        if self._partial is not None or self._is_time_to_refill():
            groups = self._admit(self.options.max_num_batched_tokens)
            if groups:
                return Step(prefill=groups)
        return self._decode()

    def retire(self) -> list[Sequence]:
        """Take finished sequences out and free their pages."""
        finished = [sequence for sequence in self.running if sequence.is_finished]
        if finished:
            self.running = [sequence for sequence in self.running if not sequence.is_finished]
            for sequence in finished:
                self._let_go(sequence)
        return finished

    def abort(self, prompt_index: int) -> list[Sequence]:
        """End a prompt's unfinished sequences with reason "abort" and free their pages."""
        aborted = [
            sequence
            for sequence in (*self.in_flight, *self.waiting)
            if sequence.prompt_index == prompt_index and not sequence.is_finished
        ]
        for sequence in aborted:
            sequence.finish_reason = "abort"
            self._let_go(sequence)
        self.running = [s for s in self.running if not s.is_finished]
        self.waiting = deque(s for s in self.waiting if not s.is_finished)
        if self._partial is not None and self._partial.leader.is_finished:
            self._partial = None
        return aborted

    def set_back(self) -> None:
        """Free every page; what ran is computed anew, before what waits and in its order."""
        for sequence in reversed(self.in_flight):
            self._let_go(sequence)
            self.waiting.appendleft(sequence)
        self.running.clear()
        self._partial = None

    def _let_go(self, sequence: Sequence) -> None:
        """Free a sequence's pages; full ones stay known."""
        if sequence.block_table and (self._partial is None or sequence is not self._partial.leader):
            self._publish(sequence, len(sequence) - 1)
        self._trails.pop(sequence, None)
        self.blocks.free(sequence.block_table)

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        if not self._shares_prefixes:
            return
        trail = self._trails.setdefault(sequence, PageTrail())
        if num_computed // self.blocks.block_size > trail.num_pages:
            self.blocks.publish(sequence.block_table, sequence.tokens[:num_computed], trail)

    def _set_back_outgrown(self) -> None:
        """Free the void pages of running sequences, and queue these first, in their order."""
        limit = self.options.recompute_at
        if limit is None:
            return
        outgrown = [s for s in self.running if len(s) == limit]
        if outgrown:
            self.running = [s for s in self.running if len(s) != limit]
            for sequence in reversed(outgrown):
                self._let_go(sequence)
                self.waiting.appendleft(sequence)

    @property
    def _num_slots(self) -> int:
        return self.options.max_num_seqs - len(self.in_flight)

    def _is_time_to_refill(self) -> bool:
        if not self.waiting:
            return False
        # A prompt step stalls all who decode, so it waits for an eighth of the slots.
        return self._num_slots >= min(len(self.waiting), max(1, self.options.max_num_seqs // 8))

    def _admit(self, budget: int) -> list[PrefillGroup]:
        """Prompts, or chunks of them, for the next step: at most ``budget`` tokens."""
        groups: list[PrefillGroup] = []
        slots = self._num_slots
        # Each running sequence may need a page in the next decode step.
        spare = self.blocks.num_free - len(self.running)
        if self._partial is not None:
            group = self._continue_partial(budget)
            if group is None:
                return groups
            budget -= group.num_tokens
            groups.append(group)
        while self.waiting and slots > 0:
            sequence = self.waiting[0]
            group = groups[-1] if groups else None
            if group is not None and not group.is_complete:
                break
            if group is not None and _continues(group.leader, sequence):
                # A follower soon needs a page of its own: the copy of the last shared one.
                if spare < 1:
                    break
                spare -= 1
                self._follow(group, sequence)
            else:
                match = self._match(sequence)
                need = self.blocks.blocks_for(len(sequence)) - len(match.pages) + match.num_idle
                # The page its first decode step may open is kept back too.
                reserve = 1 if self.running or groups else 0
                group = self._first_chunk(sequence, match, budget, is_alone=not groups)
                if group is None or need + reserve > spare:
                    break
                self._start(group, match)
                spare -= need + reserve
                budget -= group.num_tokens
                groups.append(group)
            self.waiting.popleft()
            slots -= 1
        for group in groups:
            self.running += group.members if group.is_complete else ()
        return groups

    def _match(self, sequence: Sequence) -> Match:
        if not self._shares_prefixes:
            return Match()
        return self.blocks.match(sequence.tokens)

    def _first_chunk(
        self, sequence: Sequence, match: Match, budget: int, *, is_alone: bool
    ) -> PrefillGroup | None:
        """What of a sequence the step's budget has room for; None if it must wait."""
        start = len(match.pages) * self.blocks.block_size
        length = len(sequence) - start
        if length <= budget:
            return PrefillGroup(sequence, start=start, stop=len(sequence))
        if self.options.has_chunks:
            return PrefillGroup(sequence, start=start, stop=start + budget) if budget > 0 else None
        if is_alone:
            return PrefillGroup(sequence, start=start, stop=len(sequence))
        return None

    def _start(self, group: PrefillGroup, match: Match) -> None:
        """Give a group's leader its pages, for its whole history."""
        sequence = group.leader
        table = self.blocks.reuse(match)
        fresh = self.blocks.blocks_for(len(sequence)) - len(table)
        room = self._room(sequence) - len(table)
        sequence.block_table = table + self.blocks.allocate(fresh, room=room)
        self._trails[sequence] = PageTrail(len(match.pages), match.node)
        self.num_shared_tokens += group.start
        self._publish(sequence, group.end)
        if not group.is_complete:
            self._partial = group

    def _continue_partial(self, budget: int) -> PrefillGroup | None:
        assert self._partial is not None
        leader, start = self._partial.leader, self._partial.end
        if budget < 1:
            return None
        group = PrefillGroup(leader, start=start, stop=min(start + budget, len(leader)))
        self._publish(leader, group.end)
        self._partial = None if group.is_complete else group
        return group

    def _follow(self, group: PrefillGroup, sequence: Sequence) -> None:
        """Give a follower its leader's pages."""
        group.followers.append(sequence)
        sequence.block_table = self.blocks.share(group.leader.block_table)
        trail = self._trails.get(group.leader, PageTrail())
        self._trails[sequence] = PageTrail(trail.num_pages, trail.node)
        self.num_shared_tokens += len(sequence)

    def _decode(self) -> Step:
        step = Step(num_steps=self._num_steps())
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            position = len(sequence) - 1
            while not self.blocks.can_allocate(
                self.blocks.append_cost(sequence.block_table, position)
            ):
                self._preempt_latest()
                if index >= len(self.running):
                    break
            else:
                room = self._room(sequence)
                copy = self.blocks.append(sequence.block_table, position, room=room)
                if copy is not None:
                    step.copies.append(copy)
                for later in range(position + 1, self._last_position(sequence, step) + 1):
                    self.blocks.append(sequence.block_table, later, room=room)
                self._publish(sequence, position)
                step.decode.append(sequence)
                index += 1
        assert step.decode, "add() admits only sequences that can finish alone"
        return step

    def _num_steps(self) -> int:
        """Tokens a row for which pages are at hand, so that nobody is set back for them."""
        if self.options.num_steps == 1 or self.options.recompute_at is not None:
            return 1
        if any(sequence.host_rule is not None for sequence in self.running):
            return 1
        num_steps = min(self.options.num_steps, max((s.num_left for s in self.running), default=1))
        size = self.blocks.block_size
        while num_steps > 1:
            # The copy of a shared page, and the pages that so many more tokens begin.
            pages = sum(
                1 + (len(s) - 1 + min(num_steps, s.num_left) - 1) // size - (len(s) - 1) // size
                for s in self.running
            )
            if self.blocks.can_allocate(pages):
                break
            num_steps //= 2
        return max(num_steps, 1)

    def _last_position(self, sequence: Sequence, step: Step) -> int:
        """Last position whose key and value a step writes for a sequence."""
        return len(sequence) - 1 + min(step.num_steps, sequence.num_left) - 1

    def _room(self, sequence: Sequence) -> int:
        """Pages the sequence fills when it samples all it may (the last token is not kept)."""
        return self.blocks.blocks_for(max(sequence.max_length - 1, 1))

    def _preempt_latest(self) -> None:
        """Set the latest arrival back, to be recomputed."""
        if self._partial is not None:
            sequence, self._partial = self._partial.leader, None
            self._trails.pop(sequence, None)
            self.blocks.free(sequence.block_table)
        else:
            sequence = self.running.pop()
            self._let_go(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1


def _continues(leader: Sequence, sequence: Sequence) -> bool:
    """Whether both have the same history, so that one prefill serves both."""
    return sequence.prompt_key == leader.prompt_key and not sequence.output and not leader.output
