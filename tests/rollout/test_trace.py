"""A trace holds every call's parts as trace events, and its counts are those of the stats."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tritonhybrid import ConfigError, SamplingParams
from tritonhybrid.call_trace import rank_path
from tritonhybrid.runner import Runner

# Rows, steps and pages have small numbers: these token ids can be no counts.
PROMPTS = [[71, 72, 73], list(range(60, 74)), list(range(40, 75))]
PARAMS = SamplingParams(max_new_tokens=9, n=2, seed=3, ignore_eos=True)
STEPS = ("prefill step", "decode step", "mixed step")
COUNTED = {
    "prefill_tokens": "prefill_tokens",
    "decode_tokens": "decode_tokens",
    "overrun_tokens": "overrun_tokens",
    "kept_tokens": "completion_tokens",
}


def events_of(path: Path) -> list[dict[str, Any]]:
    """The file's events, each held against the format; lanes must nest."""
    events = json.loads(path.read_text())["traceEvents"]
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        assert isinstance(event["name"], str) and event["name"]
        assert event["ph"] in ("X", "i", "M")
        assert isinstance(event["ts"], int) and event["ts"] >= 0
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "i":
            assert event["s"] == "t"
    assert list(path.parent.glob(".*")) == []
    for spans in lanes.values():
        open_ends: list[int] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)
    return events


def named(events: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [event for event in events if event["name"] in names]


def seconds(events: list[dict[str, Any]]) -> float:
    return sum(event["dur"] for event in events) / 1e6


def assert_counts_equal(events: list[dict[str, Any]], stats: Any) -> None:
    steps = named(events, *STEPS)
    for count, figure in COUNTED.items():
        assert sum(step["args"][count] for step in steps) == getattr(stats, figure), count
    assert len(named(events, "prefill step", "mixed step")) == stats.num_prefill_steps
    decode = named(events, "decode step")
    assert sum(step["args"]["steps"] for step in decode) == stats.num_decode_steps
    assert len(named(events, "preempt")) == stats.preemptions
    assert max(step["args"]["pages_used"] for step in steps) == stats.peak_blocks
    assert max(step["args"]["pages_shared"] for step in steps) == stats.shared_blocks


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_mixed_steps": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 16},
        # Five pages of 16 tokens, for four sequences of which two grow past a page.
        {"kv_cache_bytes": 5 * 4096, "max_num_seqs": 4},
    ],
    ids=["default", "mixed", "few pages"],
)
def test_counts_and_times_are_those_of_the_stats(engine_of: Any, tmp_path: Path, settings: Any):
    engine = engine_of(**settings)
    with engine.trace(tmp_path / "calls.json"):
        out = engine.rollout(PROMPTS, PARAMS)
    events, stats = events_of(tmp_path / "calls.json"), out.stats
    assert_counts_equal(events, stats)
    assert (stats.preemptions > 0) == ("kv_cache_bytes" in settings)
    assert (stats.mixed_decode_tokens > 0) == ("enable_mixed_steps" in settings)
    steps, (call,) = named(events, *STEPS), named(events, "rollout")
    # Whole microseconds: each event is short or long of one at most.
    slack = 2e-6 * len(events)
    assert seconds(steps) == pytest.approx(stats.prefill_s + stats.decode_s, abs=slack)
    assert seconds(named(events, "bind")) == pytest.approx(stats.bind_s, abs=slack)
    assert seconds([call]) == pytest.approx(stats.total_s, abs=slack)
    assert seconds(steps) <= seconds([call])
    assert call["args"]["completion_tokens"] == stats.completion_tokens
    assert {event["pid"] for event in events} == {0}
    ends = named(events, "finish")
    assert sorted((e["args"]["prompt_index"], e["args"]["sample_index"]) for e in ends) == [
        (prompt, sample) for prompt in range(3) for sample in range(2)
    ]
    assert sum(end["args"]["tokens"] for end in ends) == stats.completion_tokens
    assert {end["args"]["reason"] for end in ends} == {"length"}


def test_the_probe_stands_inside_the_first_calls_bind_and_nowhere_else(engine: Any, tmp_path: Path):
    with engine.trace(tmp_path / "calls.json"):
        engine.rollout(PROMPTS, PARAMS)
        engine.rollout(PROMPTS, PARAMS)
    events = events_of(tmp_path / "calls.json")
    (probe,) = named(events, "probe")
    first = named(events, "bind")[0]
    assert first["tid"] == probe["tid"]
    assert first["ts"] <= probe["ts"]
    assert probe["ts"] + probe["dur"] <= first["ts"] + first["dur"]
    assert len(named(events, "rollout")) == 2


def test_it_holds_no_text_and_no_token_ids(engine: Any, tmp_path: Path):
    with engine.trace(tmp_path / "calls.json"):
        engine.rollout(PROMPTS, PARAMS)
    for event in events_of(tmp_path / "calls.json"):
        for key, value in event["args"].items():
            words = ("path", "strategy", "name", "reason")
            assert isinstance(value, str if key in words else int), (key, value)
            # No list of numbers, and no number but a count.
            assert key in words or value <= 200, (key, value)


def test_a_stream_an_abort_and_a_generate_are_recorded_by_name(engine: Any, tmp_path: Path):
    import torch

    with engine.trace(tmp_path / "calls.json"):
        with engine.rollout_stream(PROMPTS, PARAMS) as stream:
            stream.abort(1)
            list(stream)
        paused = engine.rollout(PROMPTS, PARAMS, token_budget=12).paused
        engine.resume(paused)
        engine.generate(torch.tensor([[71, 72]]), max_new_tokens=3, do_sample=False)
    events = events_of(tmp_path / "calls.json")
    calls = [event["name"] for event in events if event["ph"] == "X" and event["tid"] == 1]
    assert [name for name in calls if name not in ("bind", "probe")] == [
        "rollout_stream", "rollout", "resume", "generate",
    ]  # fmt: skip
    reasons = [event["args"]["reason"] for event in named(events, "finish")]
    assert reasons.count("abort") == 2
    assert len(reasons) == 6 + 6 + 1


def test_hfs_own_loop_is_recorded_step_by_step(engine: Any, tmp_path: Path, monkeypatch: Any):
    import tritonhybrid.generation

    monkeypatch.setattr(tritonhybrid.generation, "unsuited", lambda *_: "on purpose")
    with engine.trace(tmp_path / "calls.json"):
        stats = engine.rollout(PROMPTS, PARAMS).stats
    events = events_of(tmp_path / "calls.json")
    assert stats.path == "hf"
    assert_counts_equal(events, stats)
    assert len(named(events, "finish")) == 6
    assert 0 < seconds(named(events, *STEPS)) <= stats.decode_s


def test_a_call_that_nobody_watches_reports_no_step(engine: Any, monkeypatch: pytest.MonkeyPatch):
    import tritonhybrid.call
    import tritonhybrid.decoding_loop

    def refuse(**_: Any) -> None:
        raise AssertionError("work for nobody")

    monkeypatch.setattr(tritonhybrid.decoding_loop, "StepReport", refuse)
    monkeypatch.setattr(tritonhybrid.call, "Span", refuse)
    assert engine.rollout(PROMPTS, PARAMS).stats.completion_tokens == 54


def test_a_call_that_fails_leaves_a_whole_file(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    execute, steps = Runner.execute, []

    def break_third(self: Runner, step: Any) -> Any:
        steps.append(step)
        if len(steps) == 3:
            raise ZeroDivisionError("secret 71")
        return execute(self, step)

    monkeypatch.setattr(Runner, "execute", break_third)
    path = tmp_path / "calls.json"
    with pytest.raises(ZeroDivisionError), engine.trace(path):
        engine.rollout(PROMPTS, PARAMS)
    events = events_of(path)
    (call,) = named(events, "rollout")
    assert call["args"]["error"] == "ZeroDivisionError"
    assert "secret" not in path.read_text()
    assert len(named(events, *STEPS)) == 2
    # The engine is no longer watched.
    engine.rollout(PROMPTS, PARAMS)
    assert events_of(path) == events


def test_a_block_left_while_a_stream_is_open_ends_with_what_was_seen(engine: Any, tmp_path: Path):
    path = tmp_path / "calls.json"
    with engine.trace(path):
        stream = engine.rollout_stream(PROMPTS, PARAMS)
        next(stream)
    events = events_of(path)
    (call,) = named(events, "rollout_stream")
    assert call["args"]["is_over"] is False
    stream.close()
    assert events_of(path) == events


@pytest.mark.parametrize("name", [".", "missing/calls.json"])
def test_a_path_at_which_no_file_can_be_is_refused(engine: Any, tmp_path: Path, name: str):
    with (
        pytest.raises(ConfigError, match="A trace is written to a file"),
        engine.trace(tmp_path / name),
    ):
        raise AssertionError("unreachable")
    assert list(tmp_path.iterdir()) == []


def test_of_several_ranks_each_has_a_file_of_its_own():
    assert rank_path("runs/calls.json", 0, 1) == Path("runs/calls.json")
    assert rank_path("runs/calls.json", 1, 2) == Path("runs/calls.rank1.json")
