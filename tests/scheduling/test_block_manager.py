"""Pages: counted by reference, copied before a shared one is written, never lost."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tritonhybrid.block_manager import BlockCopy, BlockManager, PageTrail


def state(blocks: BlockManager, *tables: list[int]) -> tuple:
    return blocks.num_free, blocks.num_used, list(blocks._references), [list(t) for t in tables]


def test_questions_change_nothing():
    blocks = BlockManager(4, 16)
    table = blocks.allocate(2)
    shared = blocks.share(table)
    before = state(blocks, table, shared)
    assert blocks.can_allocate(2) and not blocks.can_allocate(3)
    assert [blocks.blocks_for(n) for n in (0, 1, 16, 17, 64)] == [0, 1, 1, 2, 4]
    assert [blocks.append_cost(table, position) for position in (0, 31, 32)] == [1, 1, 1]
    assert blocks.capacity == 64
    assert state(blocks, table, shared) == before


def test_a_fresh_table_is_one_ascending_run():
    blocks = BlockManager(5, 16)
    assert blocks.allocate(3) == [0, 1, 2]
    assert blocks.allocate(2) == [3, 4]


def test_writing_into_an_own_page_costs_nothing_and_past_the_end_one_page():
    blocks = BlockManager(3, 4)
    table = blocks.allocate(1)
    assert blocks.append_cost(table, 3) == 0
    assert blocks.append(table, 3) is None and table == [0]
    assert blocks.append_cost(table, 4) == 1
    assert blocks.append(table, 4) is None and table == [0, 1]
    blocks.check_integrity([table])


def test_a_shared_page_is_copied_before_it_is_written_and_then_owned():
    blocks = BlockManager(4, 4)
    first = blocks.allocate(2)
    second = blocks.share(first)
    assert blocks.num_used == 2
    assert blocks.append_cost(second, 5) == 1
    assert blocks.append(second, 5) == BlockCopy(1, 2)
    assert (first, second) == ([0, 1], [0, 2])
    assert blocks.append_cost(second, 5) == blocks.append_cost(first, 5) == 0
    assert blocks.append(first, 5) is None
    blocks.check_integrity([first, second])


def test_a_shared_page_is_free_when_the_last_table_lets_go():
    blocks = BlockManager(2, 4)
    first = blocks.allocate(1)
    second = blocks.share(first)
    blocks.free(first)
    assert first == [] and blocks.num_used == 1
    blocks.free(second)
    assert blocks.num_free == 2
    blocks.check_integrity([])


@pytest.mark.parametrize("seed", range(5))
def test_counts_hold_after_a_random_walk(seed: int):
    walk = random.Random(seed)
    blocks = BlockManager(walk.randint(4, 40), walk.choice([1, 4, 16]))
    tables: list[list[int]] = []
    lengths: list[int] = []
    for _ in range(600):
        action = walk.choice(["allocate", "share", "append", "append", "free"])
        if action == "allocate":
            length = walk.randint(1, 3 * blocks.block_size)
            if blocks.can_allocate(blocks.blocks_for(length)):
                tables.append(blocks.allocate(blocks.blocks_for(length)))
                lengths.append(length)
        elif tables:
            index = walk.randrange(len(tables))
            if action == "share":
                tables.append(blocks.share(tables[index]))
                lengths.append(lengths[index])
            elif action == "free":
                blocks.free(tables.pop(index))
                lengths.pop(index)
            elif blocks.can_allocate(blocks.append_cost(tables[index], lengths[index])):
                blocks.append(tables[index], lengths[index])
                lengths[index] += 1
                written = tables[index][(lengths[index] - 1) // blocks.block_size]
                assert sum(written in table for table in tables) == 1
        blocks.check_integrity(tables)
        owners = Counter(page for table in tables for page in table)
        assert blocks.num_shared == sum(count > 1 for count in owners.values())
        assert blocks.num_free + blocks.num_used == blocks.num_blocks
    for table in tables:
        blocks.free(table)
    blocks.check_integrity([])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda blocks, table: table.pop(), "differ from the tables'"),
        (lambda blocks, table: blocks._is_free.__setitem__(table[0], 1), "free and in use"),
        (lambda blocks, table: setattr(blocks, "_num_free", 3), "counted 3"),
        (lambda blocks, table: setattr(blocks, "_num_shared", 1), "0 pages are shared, 1 were"),
        (lambda blocks, table: blocks._is_free.__setitem__(3, 0), "are not 4"),
    ],
    ids=["lost reference", "free and used", "miscounted", "miscounted shared", "lost page"],
)
def test_check_integrity_notices_damage(damage, message: str):
    blocks = BlockManager(4, 16)
    table = blocks.allocate(2)
    damage(blocks, table)
    with pytest.raises(AssertionError, match=message):
        blocks.check_integrity([table])


def test_tables_with_room_grow_into_runs_of_neighbouring_pages():
    blocks = BlockManager(12, 4)
    first, second = blocks.allocate(1, room=4), blocks.allocate(2, room=4)
    assert (first, second) == ([0], [4, 5])
    for position in (4, 8, 12):
        assert blocks.append(first, position, room=4) is None
    assert blocks.append(second, 8, room=4) is None
    assert (first, second) == ([0, 1, 2, 3], [4, 5, 6])
    blocks.check_integrity([first, second])


def test_room_for_a_call_is_made_at_once_out_of_what_serves_none_of_its_prompts():
    blocks = BlockManager(8, 2)
    prompts = {first: (first, *range(20, 27)) for first in (1, 2)}
    for tokens in prompts.values():
        table = blocks.allocate(4)
        blocks.publish(table, tokens, PageTrail())
        blocks.free(table)
    assert blocks.num_idle == 8
    blocks.make_room(6, [prompts[1]])
    # Three pages serve the first prompt (its last token is computed anew); of the others three
    # give way, the longest unused first and of one prompt its end first.
    assert blocks.num_evicted == 3 and blocks.num_idle == 5
    assert blocks.match(prompts[1]).pages == (0, 1, 2)
    assert blocks.match(prompts[2]).pages == (4, 5)
    blocks.check_integrity([])


def test_room_gives_way_when_nothing_else_is_free():
    blocks = BlockManager(5, 4)
    first, second = blocks.allocate(1, room=4), blocks.allocate(4, room=4)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert not blocks.can_allocate(1)
    blocks.check_integrity([first, second])


def test_a_shared_page_is_copied_to_where_its_table_has_room():
    blocks = BlockManager(12, 4)
    first = blocks.allocate(2, room=4)
    second = blocks.share(first)
    assert blocks.append(second, 5, room=4) == BlockCopy(1, 4)
    assert blocks.append(second, 8, room=4) is None
    assert second == [0, 4, 5]
    blocks.check_integrity([first, second])
