"""Which decode steps are captured, when again, and when no more."""

import pytest
import torch

from tritonhybrid.decode_graphs import DecodeGraphs, FixedTensors, GraphKey, bucket


class Replays:
    """Stands in for a CUDA graph: runs the body again."""

    def __init__(self, body):
        self.replay = body


class Call:
    """The steps of one call, and what happened in their order."""

    def __init__(self, graphs, addresses, largest=8, name=""):
        self.events = []
        graphs.begin(
            addresses,
            largest=largest,
            run=lambda key: self.events.append(("run", key.num_rows)),
            blank=lambda key: self.events.append(("blank", key.num_rows)),
        )


def capturing(body):
    body()
    return Replays(body)


def key(num_rows, num_steps=4, draw="greedy"):
    return GraphKey(num_rows, num_steps, draw)


def test_buckets_are_powers_of_two_then_multiples_of_sixteen():
    sizes = [bucket(n) for n in range(1, 514)]
    assert sizes[:18] == [1, 2, 4, 4, 8, 8, 8, 8] + 8 * [16] + 2 * [32]
    assert set(sizes) == {1, 2, 4, 8, *range(16, 529, 16)}
    assert all(size >= n for n, size in enumerate(sizes, 1))


def test_a_bucket_is_captured_once_over_padding_and_then_replayed():
    graphs = DecodeGraphs(lambda: capturing)
    call = Call(graphs, "a")
    for _ in range(3):
        assert graphs.has(key(8))
        graphs.replay(key(8))
    assert call.events == [("blank", 8), ("run", 8), ("run", 8), ("run", 8), ("run", 8)]
    assert (graphs.num_captures, graphs.num_replays, graphs.num_recaptures) == (1, 3, 0)


def test_the_largest_bucket_of_a_call_is_captured_first_and_no_other_unasked():
    graphs = DecodeGraphs(lambda: capturing)
    Call(graphs, "a", largest=37)
    assert graphs.has(key(4))
    assert graphs.has(key(16))
    assert [k.num_rows for k in graphs.keys] == [48, 4, 16]


def test_ways_of_sampling_and_numbers_of_steps_are_captured_apart():
    graphs = DecodeGraphs(lambda: capturing)
    Call(graphs, "a", largest=4)
    keys = [key(4), key(4, num_steps=1), key(4, draw="top-p")]
    assert all(graphs.has(k) for k in keys)
    assert graphs.keys == tuple(keys)


def test_graphs_serve_later_calls_at_the_same_addresses():
    graphs = DecodeGraphs(lambda: capturing)
    first = Call(graphs, "a")
    assert graphs.has(key(8))
    graphs.end()
    second = Call(graphs, "a")
    assert graphs.has(key(8))
    graphs.replay(key(8))
    assert first.events == [("blank", 8), ("run", 8)]
    assert second.events == [("run", 8)]
    assert (graphs.num_captures, graphs.num_recaptures) == (1, 0)


def test_an_address_that_changed_has_everything_captured_again_and_counted():
    graphs = DecodeGraphs(lambda: capturing)
    Call(graphs, "a")
    assert graphs.has(key(8)) and graphs.has(key(2))
    call = Call(graphs, "b")
    assert graphs.keys == ()
    assert graphs.has(key(8))
    assert call.events == [("blank", 8), ("run", 8)]
    assert (graphs.num_captures, graphs.num_recaptures) == (3, 2)


def test_after_the_time_limit_nothing_more_is_captured_and_what_is_stays():
    now = [0.0]

    def slow(body):
        now[0] += 6.0
        return Replays(body)

    graphs = DecodeGraphs(lambda: slow, limit_s=10.0, clock=lambda: now[0])
    Call(graphs, "a")
    assert graphs.has(key(8)) and graphs.has(key(4))
    assert not graphs.has(key(2))
    assert graphs.reason == (
        "capturing took 12.0 s of at most 10 s, for 2 graphs; no more are captured"
    )
    assert graphs.has(key(8))
    graphs.replay(key(4))
    Call(graphs, "b")
    assert not graphs.has(key(8))
    assert graphs.num_captures == 2


def test_a_capture_that_fails_turns_graphs_off_with_the_reason():
    def failing(body):
        if graphs.num_captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Replays(body)

    graphs = DecodeGraphs(lambda: failing)
    Call(graphs, "a")
    assert graphs.has(key(8))
    assert not graphs.has(key(4))
    assert not graphs.has(key(8))
    assert graphs.reason == (
        "capturing failed: RuntimeError: operation not permitted when stream is capturing"
    )


def test_an_interrupt_passes_through_a_capture():
    def interrupted(body):
        raise KeyboardInterrupt

    graphs = DecodeGraphs(lambda: interrupted)
    Call(graphs, "a")
    with pytest.raises(KeyboardInterrupt):
        graphs.has(key(8))
    assert graphs.reason is None and graphs.keys == ()


def test_released_graphs_are_captured_anew():
    graphs = DecodeGraphs(lambda: capturing)
    Call(graphs, "a")
    assert graphs.has(key(8))
    graphs.release()
    Call(graphs, "a")
    assert graphs.keys == ()
    assert graphs.has(key(8))
    assert (graphs.num_captures, graphs.num_recaptures) == (2, 0)


def test_graphs_that_are_thrown_away_take_their_memory_pool_along():
    made = []

    def new_capture():
        made.append(capturing)
        return capturing

    graphs = DecodeGraphs(new_capture)
    for addresses, expected in (("a", 1), ("a", 1), ("b", 2)):
        Call(graphs, addresses)
        assert graphs.has(key(8)) and graphs.has(key(4))
        assert len(made) == expected


def test_fixed_tensors_stay_while_they_fit_and_hold_the_newest_rows():
    fixed = FixedTensors()
    first = fixed.keep("cos", torch.arange(10.0).view(5, 2))
    at = first.data_ptr()
    assert torch.equal(first, torch.arange(10.0).view(5, 2))
    for rows in (1, 8, 3):
        values = torch.randn(rows, 2)
        place = fixed.keep("cos", values)
        assert place.data_ptr() == at
        assert torch.equal(place, values)
    other = fixed.keep("sin", torch.zeros(5, 2))
    assert other.data_ptr() != at
    assert fixed.keep("cos", torch.zeros(9, 2)).shape == (9, 2)
    assert fixed.keep("cos", torch.zeros(9, 2, dtype=torch.float64)).dtype == torch.float64
