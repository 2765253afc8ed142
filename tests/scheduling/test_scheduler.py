"""Continuous batching without torch: every sequence ends with its own tokens, in order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from tritonhybrid.block_manager import BlockManager
from tritonhybrid.errors import CacheExhaustedError
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.scheduler import Scheduler, SchedulerOptions, Step
from tritonhybrid.sequence import Sequence

END = 1


def sequence(prompt: tuple[int, ...], new: int, *, index: int = 0, sample: int = 0) -> Sequence:
    return Sequence(
        prompt_index=index,
        sample_index=sample,
        uid=index,
        key=sample,
        prompt=prompt,
        prompt_key=hash(prompt),
        params=SamplingParams(max_new_tokens=new),
        end_ids=frozenset({END}),
    )


def samples(prompt: tuple[int, ...], new: int, count: int, index: int = 0) -> list[Sequence]:
    return [sequence(prompt, new, index=index, sample=i) for i in range(count)]


@dataclass
class Model:
    """Reads its input through the pages alone; a token is a checksum of all that it sees.

    What a sequence shorter than ``recompute_at`` wrote is void for one that is not.
    """

    blocks: BlockManager
    recompute_at: int | None = None
    slots: dict[int, tuple[int, bool]] = field(default_factory=dict)
    log: list[tuple[str, list[tuple[int, int]]]] = field(default_factory=list)
    num_computed: int = 0
    num_overrun: int = 0

    def execute(self, step: Step) -> list[Sequence]:
        for copy in step.copies:
            for offset in range(self.blocks.block_size):
                source = copy.source * self.blocks.block_size + offset
                if source in self.slots:
                    self.slots[copy.target * self.blocks.block_size + offset] = self.slots[source]
        run = step.sampled
        kind = "+".join(["decode"] * bool(step.decode) + ["prefill"] * bool(step.prefill))
        self.log.append((kind, [(row.prompt_index, row.sample_index) for row in run]))
        self.num_computed += sum(group.num_tokens for group in step.prefill)
        for group in step.prefill:
            for position in range(group.start, group.end):
                self.write(group.leader, position)
        for _ in range(step.num_steps):
            for row in step.decode:
                # A row that has ended runs on; what it writes is nobody's.
                if not row.is_finished:
                    self.write(row, len(row) - 1)
            for row in run:
                if row.is_finished:
                    self.num_overrun += 1
                    continue
                seen = [self.slots[self.slot(row, position)] for position in range(len(row))]
                wanted = [(token, self.is_grown(row)) for token in row.tokens]
                assert seen == wanted, "a page holds another sequence's tokens, or void ones"
                row.append(next_token(row), 0.0, 0.0)
        return run

    def slot(self, row: Sequence, position: int) -> int:
        size = self.blocks.block_size
        return row.block_table[position // size] * size + position % size

    def write(self, row: Sequence, position: int) -> None:
        self.slots[self.slot(row, position)] = row.tokens[position], self.is_grown(row)

    def is_grown(self, row: Sequence) -> bool:
        return self.recompute_at is not None and len(row) >= self.recompute_at


def next_token(row: Sequence) -> int:
    value = row.sample_index
    for token in row.tokens:
        value = (value * 31 + token + 7) % 9973
    return value % 40


def expected(row: Sequence) -> list[int]:
    """The same sequence alone, without pages."""
    alone = sequence(row.prompt, row.params.max_new_tokens, sample=row.sample_index)
    while not alone.is_finished:
        alone.append(next_token(alone), 0.0, 0.0)
    return alone.output


def scheduler_of(
    blocks: BlockManager, *, max_num_seqs: int = 8, max_num_batched_tokens: int = 64, **options: Any
) -> Scheduler:
    chosen = SchedulerOptions(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, **options
    )
    return Scheduler(blocks, chosen)


def run(
    rows: list[Sequence],
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    blocks: BlockManager | None = None,
    slots: dict[int, tuple[int, bool]] | None = None,
    **options: Any,
) -> tuple[Scheduler, Model]:
    blocks = blocks or BlockManager(num_blocks, block_size)
    scheduler = scheduler_of(blocks, **options)
    scheduler.add(rows)
    model = Model(blocks, scheduler.options.recompute_at, slots if slots is not None else {})
    finished = 0
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step.prefill or step.decode
        assert scheduler.options.is_mixed or not (step.prefill and step.decode)
        assert len(scheduler.in_flight) <= scheduler.options.max_num_seqs
        model.execute(step)
        blocks.check_integrity([row.block_table for row in scheduler.in_flight])
        finished += len(scheduler.retire())
        assert len(model.log) < 5000
    assert finished == len(rows)
    blocks.check_integrity([])
    for row in rows:
        assert row.output == expected(row)
    return scheduler, model


def test_all_prompts_are_prefilled_once_and_then_decoded_together():
    rows = [sequence((i + 2,) * (i + 1), 5, index=i) for i in range(3)]
    scheduler, model = run(rows, num_blocks=32)
    assert model.log[0] == ("prefill", [(0, 0), (1, 0), (2, 0)])
    assert [kind for kind, _ in model.log].count("prefill") == 1
    assert scheduler.preemptions == 0


def test_samples_of_a_prompt_share_its_pages_and_copy_only_the_last():
    rows = samples((9,) * 10, 6, 4)
    blocks = BlockManager(32, 4)
    scheduler = scheduler_of(blocks)
    scheduler.add(rows)
    model = Model(blocks)
    step = scheduler.schedule()
    assert [len(group.members) for group in step.prefill] == [4]
    assert blocks.num_used == 3
    model.execute(step)
    step = scheduler.schedule()
    # The last to write keeps the page that all others have left.
    assert len(step.copies) == 3 and {copy.source for copy in step.copies} == {2}
    assert blocks.num_used == 3 + 3
    assert all(row.block_table[:2] == [0, 1] for row in rows)
    model.execute(step)


def test_a_full_last_page_is_shared_for_good():
    rows = samples((9,) * 8, 3, 3)
    scheduler, _ = run(rows, num_blocks=16)
    assert scheduler.preemptions == 0
    assert len({tuple(row.output) for row in rows}) == 3


def test_equal_prompts_at_different_places_of_the_call_share_when_neighbours():
    rows = [sequence((8,) * 9, 2, index=0), sequence((8,) * 9, 2, index=1)]
    _, model = run(rows, num_blocks=16)
    assert model.log[0] == ("prefill", [(0, 0), (1, 0)])


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
def test_more_samples_than_slots_all_run(max_num_seqs: int):
    rows = [*samples((9,) * 6, 7, 5), *samples((4,) * 3, 4, 2, index=1)]
    _, model = run(rows, num_blocks=40, max_num_seqs=max_num_seqs)
    assert max(len(members) for _, members in model.log) == max_num_seqs


@pytest.mark.parametrize("num_blocks", [6, 7, 9, 12])
def test_preempted_sequences_are_recomputed_to_the_same_tokens(num_blocks: int):
    rows = [sequence((i + 2,) * (3 * i + 1), 14, index=i) for i in range(3)]
    rows += samples((30, 31, 32, 33, 34), 12, 3, index=3)
    scheduler, _ = run(rows, num_blocks=num_blocks)
    if num_blocks < 12:
        assert scheduler.preemptions > 0


def test_a_sequence_whose_pages_become_void_is_recomputed_once_with_pages_of_its_own():
    rows = [*samples((9,) * 6, 9, 3), sequence((3,) * 3, 9, index=1)]
    scheduler, model = run(rows, num_blocks=40, recompute_at=10)
    prefills = [members for kind, members in model.log if kind == "prefill"]
    samples_of_the_first = [(0, 0), (0, 1), (0, 2)]
    assert prefills == [[*samples_of_the_first, (1, 0)], samples_of_the_first, [(1, 0)]]
    assert scheduler.preemptions == 0


def test_the_latest_arrival_is_set_back_first():
    rows = [sequence((i + 2,) * 4, 12, index=i) for i in range(3)]
    _, model = run(rows, num_blocks=7)
    ends = {}
    for number, (_, members) in enumerate(model.log):
        for index, _sample in members:
            ends[index] = number
    assert ends[0] < ends[2]


def test_a_step_takes_no_more_prompt_tokens_than_allowed_but_always_one_prompt():
    rows = [sequence((i + 2,) * 10, 2, index=i) for i in range(4)]
    rows.append(sequence((9,) * 30, 2, index=4))
    _, model = run(rows, num_blocks=64, max_num_batched_tokens=20)
    prefills = [members for kind, members in model.log if kind == "prefill"]
    assert prefills == [[(0, 0), (1, 0)], [(2, 0), (3, 0)], [(4, 0)]]


def test_a_sequence_that_ends_leaves_at_once_and_its_pages_serve_another():
    stops = next(p for p in range(2, 400) if expected(sequence((p,) * 4, 20))[:3].count(END))
    rows = [sequence((stops,) * 4, 20, index=0), sequence((3,) * 4, 20, index=1)]
    _, model = run(rows, num_blocks=24)
    steps = sum((0, 0) in members for _, members in model.log)
    assert steps == len(rows[0].output) <= 3
    assert rows[0].finish_reason == "stop" and rows[0].output[-1] == END


def test_a_sequence_that_cannot_fit_alone_is_refused_and_none_is_queued():
    scheduler = scheduler_of(BlockManager(3, 4), max_num_seqs=4)
    fits = sequence((2,) * 4, 9, index=0)
    with pytest.raises(CacheExhaustedError, match=r"at most 12 tokens.*prompt 4 \+ max_new_tokens"):
        scheduler.add([fits, sequence((2,) * 4, 10, index=1)])
    assert not scheduler.has_work
    run([fits], num_blocks=3)


def test_a_beginning_that_prompts_share_is_computed_once_in_one_step_and_in_later_ones():
    common = tuple(range(2, 12))
    rows = [sequence((*common, 30 + i), 6, index=i) for i in range(4)]
    scheduler, model = run(rows, max_num_seqs=2)
    # Two pages of four are shared by all four; each computes the other three tokens.
    assert model.num_computed == 11 + 3 * 3
    assert scheduler.num_shared_tokens == 3 * 8


def test_pages_serve_a_later_call_and_its_continuations_until_they_are_forgotten():
    blocks, slots = BlockManager(64, 4), {}
    first = sequence(tuple(range(2, 13)), 9)
    run([first], blocks=blocks, slots=slots)
    assert blocks.num_used == 0 and blocks.num_idle == 4
    longer = (*first.tokens, 7, 8)
    _, model = run([sequence(longer, 3)], blocks=blocks, slots=slots)
    # All of the first call but its last token, whole pages.
    assert model.num_computed == len(longer) - (len(first) - 1) // 4 * 4
    blocks.forget()
    _, model = run([sequence(longer, 3)], blocks=blocks, slots={})
    assert model.num_computed == len(longer)


def test_idle_pages_give_way_the_longest_unused_first():
    blocks, slots = BlockManager(6, 4), {}
    for prompt in ((5,) * 9, (6,) * 9):
        run([sequence(prompt, 1)], blocks=blocks, slots=slots)
    assert blocks.num_idle == 4
    run([sequence((7,) * 16, 1)], blocks=blocks, slots=slots)
    assert blocks.num_evicted == 2
    _, model = run([sequence((6,) * 9, 1)], blocks=blocks, slots=slots)
    assert model.num_computed == 1
    _, model = run([sequence((5,) * 9, 1)], blocks=blocks, slots=slots)
    assert model.num_computed == 9


def test_without_shared_prefixes_every_prompt_is_computed_and_nothing_is_kept():
    rows = [sequence((*range(2, 12), 30 + i), 6, index=i) for i in range(3)]
    scheduler, model = run(rows, shares_prefixes=False)
    assert model.num_computed == 33
    assert scheduler.blocks.num_idle == 0


def test_a_long_prompt_is_computed_in_chunks_and_its_samples_join_the_last():
    rows = [*samples(tuple(range(2, 32)), 4, 3), sequence((9, 8, 7), 4, index=1)]
    _, model = run(rows, max_num_batched_tokens=12, has_chunks=True)
    assert model.log[:3] == [
        ("prefill", []),
        ("prefill", []),
        ("prefill", [(0, 0), (0, 1), (0, 2), (1, 0)]),
    ]
    assert model.num_computed == 33


def test_a_mixed_step_decodes_what_runs_beside_a_chunk_of_what_comes():
    rows = [sequence((3,) * 4, 8, index=0), sequence(tuple(range(2, 32)), 4, index=1)]
    _, model = run(rows, max_num_batched_tokens=12, has_chunks=True, is_mixed=True)
    # Twelve tokens a step: the short prompt and 8 of the long one, then a token and 11 at a time.
    assert [kind for kind, _ in model.log[:4]] == ["prefill", *["decode+prefill"] * 2, "decode"]
    assert [len(members) for _, members in model.log[:4]] == [1, 1, 2, 2]


def test_what_may_grow_longest_goes_first_and_samples_stay_together():
    rows = [sequence((3,) * 4, 2, index=0), *samples((4,) * 4, 9, 2, index=1)]
    rows.append(sequence((5,) * 4, 5, index=2))
    _, model = run(rows, max_num_seqs=2, is_longest_first=True)
    starts = dict.fromkeys(index for _, members in model.log for index, _ in members)
    assert list(starts) == [1, 2, 0]


def test_several_tokens_a_step_are_the_same_tokens_and_those_past_an_end_are_cut():
    rows = [sequence((i + 2,) * (3 * i + 1), 3 + 4 * i, index=i) for i in range(3)]
    _, model = run(rows, num_steps=4)
    assert max(len(row.output) for row in rows) == 11
    assert sum(kind == "decode" for kind, _ in model.log) == 3
    assert model.num_overrun > 0


def test_fewer_tokens_a_step_where_pages_are_short_so_that_nobody_is_set_back():
    rows = [sequence((i + 2,) * 4, 9, index=i) for i in range(2)]
    scheduler, _ = run(rows, num_blocks=6, num_steps=8)
    assert scheduler.preemptions == 0


def test_an_aborted_prompt_ends_with_what_it_has_and_frees_its_pages():
    rows = [*samples((9,) * 6, 8, 3), sequence((3,) * 5, 8, index=1)]
    blocks = BlockManager(32, 4)
    scheduler = scheduler_of(blocks, max_num_seqs=2)
    scheduler.add(rows)
    model = Model(blocks)
    for _ in range(3):
        model.execute(scheduler.schedule())
        scheduler.retire()
    assert scheduler.abort(0) == rows[:3]
    assert [row.finish_reason for row in rows] == ["abort"] * 3 + [None]
    assert [len(row.output) for row in rows] == [3, 3, 0, 0]
    assert blocks.num_used == 0 and scheduler.abort(0) == []
    while scheduler.has_work:
        model.execute(scheduler.schedule())
        scheduler.retire()
    assert rows[3].output == expected(rows[3])
    blocks.check_integrity([])


def test_a_prompt_can_be_aborted_between_its_chunks():
    rows = [sequence(tuple(range(2, 32)), 4), sequence((3,) * 5, 3, index=1)]
    blocks = BlockManager(32, 4)
    scheduler = scheduler_of(blocks, max_num_batched_tokens=8, has_chunks=True)
    scheduler.add(rows)
    model = Model(blocks)
    model.execute(scheduler.schedule())
    assert scheduler.in_flight == [rows[0]]
    assert scheduler.abort(0) == [rows[0]]
    while scheduler.has_work:
        model.execute(scheduler.schedule())
        scheduler.retire()
    assert rows[1].output == expected(rows[1])
    blocks.check_integrity([])


@pytest.mark.parametrize("after", range(1, 8))
def test_everything_set_back_ends_with_the_same_tokens(after: int):
    rows = [*samples(tuple(range(2, 20)), 5, 2), sequence((3,) * 5, 9, index=1)]
    blocks = BlockManager(32, 4)
    scheduler = scheduler_of(blocks, max_num_batched_tokens=8, has_chunks=True, max_num_seqs=2)
    scheduler.add(rows)
    model = Model(blocks)
    steps = 0
    while scheduler.has_work:
        model.execute(scheduler.schedule())
        scheduler.retire()
        steps += 1
        if steps == after:
            scheduler.set_back()
            assert blocks.num_used == 0 and not scheduler.in_flight
    for row in rows:
        assert row.output == expected(row)
    blocks.check_integrity([])


@pytest.mark.parametrize("seed", range(120))
def test_no_sequence_is_lost_or_mixed_up_in_a_random_call(seed: int):
    walk = random.Random(seed)
    size = walk.choice([1, 3, 4, 16])
    rows: list[Sequence] = []
    for index in range(walk.randint(1, 8)):
        prompt = tuple(walk.randint(2, 4) for _ in range(walk.randint(1, 20)))
        rows += samples(prompt, walk.randint(1, 20), walk.randint(1, 5), index)
    least = max(-(-(row.max_length - 1) // size) for row in rows)
    settings = {
        "num_blocks": least + walk.randint(0, 12),
        "block_size": size,
        "max_num_seqs": walk.randint(1, 10),
        "max_num_batched_tokens": walk.choice([1, 16, 100]),
        "recompute_at": walk.choice([None, None, 8, 15, 21]),
        "has_chunks": walk.choice([False, True]),
        "is_mixed": walk.choice([False, True]),
        "is_longest_first": walk.choice([False, True]),
        "num_steps": walk.choice([1, 1, 2, 5]),
        "shares_prefixes": walk.choice([False, True]),
    }
    _, first = run(rows, **settings)
    again = [
        sequence(
            row.prompt, row.params.max_new_tokens, index=row.prompt_index, sample=row.sample_index
        )
        for row in rows
    ]
    _, second = run(again, **settings)
    assert first.log == second.log
