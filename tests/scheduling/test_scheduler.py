"""Continuous batching without torch: every sequence ends with its own tokens, in order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tritonhybrid.block_manager import BlockManager
from tritonhybrid.errors import CacheExhaustedError
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.scheduler import Scheduler, Step
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

    def execute(self, step: Step) -> list[Sequence]:
        size = self.blocks.block_size
        if step.decode:
            for copy in step.copies:
                for offset in range(size):
                    source = copy.source * size + offset
                    if source in self.slots:
                        self.slots[copy.target * size + offset] = self.slots[source]
            for row in step.decode:
                position = len(row) - 1
                slot = row.block_table[position // size] * size + position % size
                self.slots[slot] = row.last_token, self.is_grown(row)
            run = step.decode
        else:
            for group in step.prefill:
                for position, token in enumerate(group.leader.tokens):
                    slot = group.leader.block_table[position // size] * size + position % size
                    self.slots[slot] = token, self.is_grown(group.leader)
            run = [member for group in step.prefill for member in group.members]
        kind = "decode" if step.decode else "prefill"
        self.log.append((kind, [(row.prompt_index, row.sample_index) for row in run]))
        for row in run:
            seen = [
                self.slots[row.block_table[p // size] * size + p % size] for p in range(len(row))
            ]
            wanted = [(token, self.is_grown(row)) for token in row.tokens]
            assert seen == wanted, "a page holds another sequence's tokens, or void ones"
            row.append(next_token(row), 0.0, 0.0)
        return run

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


def run(
    rows: list[Sequence],
    *,
    num_blocks: int,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    recompute_at: int | None = None,
) -> tuple[Scheduler, Model]:
    blocks = BlockManager(num_blocks, block_size)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        recompute_at=recompute_at,
    )
    scheduler.add(rows)
    model = Model(blocks, recompute_at)
    finished = 0
    while scheduler.has_work:
        step = scheduler.schedule()
        assert bool(step.prefill) != bool(step.decode)
        assert len(scheduler.running) <= max_num_seqs
        model.execute(step)
        blocks.check_integrity([row.block_table for row in scheduler.running])
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
    scheduler = Scheduler(blocks, max_num_seqs=8, max_num_batched_tokens=64)
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
    scheduler = Scheduler(BlockManager(3, 4), max_num_seqs=4, max_num_batched_tokens=64)
    fits = sequence((2,) * 4, 9, index=0)
    with pytest.raises(CacheExhaustedError, match=r"at most 12 tokens.*prompt 4 \+ max_new_tokens"):
        scheduler.add([fits, sequence((2,) * 4, 10, index=1)])
    assert not scheduler.has_work
    run([fits], num_blocks=3)


def test_clear_frees_every_page():
    blocks = BlockManager(16, 4)
    scheduler = Scheduler(blocks, max_num_seqs=2, max_num_batched_tokens=64)
    scheduler.add(samples((9,) * 6, 4, 5))
    Model(blocks).execute(scheduler.schedule())
    scheduler.clear()
    assert not scheduler.has_work and blocks.num_used == 0
    blocks.check_integrity([])


@pytest.mark.parametrize("seed", range(24))
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
