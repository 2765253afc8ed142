"""decode_advance against a loop over rows: pages, padding, last positions, the ring, two tables."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels.decode_advance import decode_advance, decode_advance_ref
from tritonhybrid_kernels.errors import KernelArgumentError

PATHS = (decode_advance, decode_advance_ref)
NAN = float("nan")
GARBAGE = -(2**31)


class Rows:
    """B rows in pages of S; the tails of their block tables hold garbage."""

    def __init__(self, device, starts, budgets, *, block_size=4, ring_size=5, original=None):
        batch = len(starts)
        self.block_size = block_size
        self.ring_size = ring_size
        self.original = original
        lasts = [p + n - 1 for p, n in zip(starts, budgets, strict=True)]
        width = max((last // block_size + 1 for last in lasts), default=0) + 2
        pages = (torch.randperm(batch * width) + 7).view(batch, width).tolist()
        for row, last in zip(pages, lasts, strict=True):
            row[last // block_size + 1 :] = [GARBAGE] * (width - last // block_size - 1)
        self.pages = pages
        self.expected = [
            {
                "input_ids": 1000 + row,
                "positions": start,
                "next_positions": start + 1,
                "slot_mapping": pages[row][start // block_size] * block_size + start % block_size
                if budgets[row]
                else -1,
                "context_lens": start + 1 if budgets[row] else 0,
                "steps": 0,
                "last_positions": lasts[row],
                "rope_rows": start + (original if original and start >= original else 0),
            }
            for row, start in enumerate(starts)
        ]
        self.ring = [[None] * batch for _ in range(ring_size)]

        def column(name, dtype=torch.int64):
            return torch.tensor([row[name] for row in self.expected], dtype=dtype, device=device)

        table = torch.tensor(pages, dtype=torch.int32, device=device).view(batch, width)
        self.buffers = {name: column(name) for name in self.columns() if name != "context_lens"}
        self.buffers["context_lens"] = column("context_lens", torch.int32)
        # Rows of a wider ring, as a bucket smaller than the largest has them.
        wide = (ring_size, batch + 3)
        self.buffers |= {
            "block_table": table,
            "ring_tokens": torch.full(wide, -5, dtype=torch.int64, device=device)[:, :batch],
            "ring_logprobs": torch.full(wide, NAN, device=device)[:, :batch],
            "ring_raw_logprobs": torch.full(wide, NAN, device=device)[:, :batch],
        }

    def columns(self):
        names = ["input_ids", "positions", "next_positions", "slot_mapping", "context_lens"]
        names += ["steps", "last_positions"]
        return [*names, "rope_rows"] if self.original else names

    def step(self, path, number):
        """One call, and the same row by row in Python."""
        batch = len(self.expected)
        device = self.buffers["positions"].device
        tokens = torch.arange(batch, device=device) + 10_000 * (number + 1)
        logprobs, raw = torch.randn(2, batch, device=device).unbind()
        kwargs = {"rope_original": self.original} if self.original else {}
        path(tokens, logprobs, raw, block_size=self.block_size, **self.buffers, **kwargs)
        for index, row in enumerate(self.expected):
            if row["slot_mapping"] < 0:
                continue
            if row["steps"] < self.ring_size:
                values = (tokens[index], logprobs[index], raw[index])
                self.ring[row["steps"]][index] = [value.item() for value in values]
            row["steps"] += 1
            if row["positions"] == row["last_positions"]:
                row["slot_mapping"], row["context_lens"] = -1, 0
                continue
            position = row["positions"] + 1
            row["input_ids"] = tokens[index].item()
            row["positions"], row["next_positions"] = position, position + 1
            row["context_lens"] = position + 1
            page = self.pages[index][position // self.block_size]
            row["slot_mapping"] = page * self.block_size + position % self.block_size
            is_long = self.original and position >= self.original
            row["rope_rows"] = position + (self.original if is_long else 0)

    def check(self):
        for name in self.columns():
            assert self.buffers[name].tolist() == [row[name] for row in self.expected], name
        for name, place, nothing in (
            ("ring_tokens", 0, -5),
            ("ring_logprobs", 1, NAN),
            ("ring_raw_logprobs", 2, NAN),
        ):
            want = [[nothing if v is None else v[place] for v in row] for row in self.ring]
            want = torch.tensor(want, dtype=torch.float64).view(self.buffers[name].shape)
            got = self.buffers[name].double().cpu()
            assert torch.equal(got.nan_to_num(-7), want.nan_to_num(-7)), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("starts", "budgets"),
    [
        ([3], [4]),
        ([0, 3, 7], [5, 5, 5]),
        ([4, 9, 2, 3, 11, 0, 6], [1, 2, 5, 0, 3, 0, 4]),
        ([i % 9 for i in range(131)], [i % 6 for i in range(131)]),
    ],
    ids=["one row", "page boundaries", "ragged and padding", "two programs"],
)
def test_rows_advance_as_one_by_one(device, path, starts, budgets):
    rows = Rows(device, starts, budgets)
    for number in range(4):
        rows.step(path, number)
        rows.check()


@pytest.mark.parametrize("path", PATHS)
def test_a_row_at_its_last_position_keeps_its_token_and_becomes_padding(device, path):
    rows = Rows(device, [5], [1])
    rows.step(path, 0)
    assert rows.buffers["ring_tokens"][0, 0] == 10_000
    assert rows.buffers["slot_mapping"].item() == -1
    assert rows.buffers["context_lens"].item() == 0
    before = {name: buffer.clone() for name, buffer in rows.buffers.items()}
    rows.step(path, 1)
    assert all(torch.equal(rows.buffers[n].nan_to_num(), b.nan_to_num()) for n, b in before.items())


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_written_past_the_end_of_the_ring(device, path):
    rows = Rows(device, [1, 2], [9, 9], ring_size=2)
    for number in range(4):
        rows.step(path, number)
    rows.check()
    assert rows.buffers["steps"].tolist() == [4, 4]


@pytest.mark.parametrize("path", PATHS)
def test_rope_rows_move_to_the_second_table_where_the_position_does(device, path):
    rows = Rows(device, [2, 4, 5, 9], [5, 5, 5, 0], original=6)
    for number in range(4):
        rows.step(path, number)
        rows.check()
    assert rows.buffers["rope_rows"].tolist() == [12, 14, 15, 15]


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_began_in_the_second_table_stays_there(device, path):
    rows = Rows(device, [2], [5], original=6)
    rows.buffers["rope_rows"] += 6
    for number in range(4):
        rows.step(path, number)
    assert rows.buffers["rope_rows"].tolist() == [12]


@pytest.mark.parametrize("path", PATHS)
def test_no_rows_change_nothing(device, path):
    rows = Rows(device, [], [])
    rows.step(path, 0)
    rows.check()


@pytest.mark.parametrize("path", PATHS)
def test_every_buffer_stays_where_it_is(device, path):
    rows = Rows(device, [0, 3, 7], [5, 5, 5], original=6)
    before = {name: buffer.data_ptr() for name, buffer in rows.buffers.items()}
    rows.step(path, 0)
    assert {name: buffer.data_ptr() for name, buffer in rows.buffers.items()} == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("positions", lambda t: t.int(), "positions must be contiguous and beside the operands"),
        ("context_lens", lambda t: t.long(), "context_lens must be contiguous"),
        ("steps", lambda t: t[:1], "steps has the wrong shape"),
        ("block_table", lambda t: t[:1], "block_table has the wrong shape"),
        ("block_table", lambda t: t.long(), "block_table must have contiguous rows"),
        ("ring_logprobs", lambda t: t[:2], "ring_logprobs has the wrong shape"),
        ("ring_tokens", lambda t: t.int(), "ring_tokens must have contiguous rows"),
        ("rope_rows", lambda t: t.float(), "rope_rows must be contiguous"),
    ],
)
def test_bad_arguments_are_named(device, name, change, message):
    rows = Rows(device, [0, 3], [5, 5], original=6)
    rows.buffers[name] = change(rows.buffers[name])
    with pytest.raises(KernelArgumentError, match=f"decode_advance: {message}"):
        rows.step(decode_advance, 0)


def test_a_page_without_slots_is_refused(device):
    rows = Rows(device, [0], [5])
    rows.block_size = 0
    with pytest.raises(KernelArgumentError, match="a page has slots"):
        rows.step(decode_advance, 0)
