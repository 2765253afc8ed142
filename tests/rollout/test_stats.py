"""A call's figures, held against what a spy counted from the tables and the steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tritonhybrid import SamplingParams
from tritonhybrid.runner import Runner
from tritonhybrid.scheduler import Scheduler
from tritonhybrid.stats import RolloutStats


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Every step's tables, counted page by page, and the tokens that it computed."""
    seen: dict[str, list[Any]] = {"used": [], "shared": [], "mixed": [], "decode": []}
    schedule, execute = Scheduler.schedule, Runner.execute

    def watched_schedule(self: Scheduler) -> Any:
        step = schedule(self)
        owners = Counter(page for s in self.in_flight for page in s.block_table)
        seen["used"].append(len(owners))
        seen["shared"].append(sum(count > 1 for count in owners.values()))
        return step

    def watched_execute(self: Runner, step: Any) -> Any:
        seen["mixed" if step.prefill else "decode"].append(len(step.decode))
        return execute(self, step)

    monkeypatch.setattr(Scheduler, "schedule", watched_schedule)
    monkeypatch.setattr(Runner, "execute", watched_execute)
    return seen


def sampling(new: int, n: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, n=n, seed=3, ignore_eos=True)


@pytest.mark.parametrize(
    ("prompts", "n", "settings", "most"),
    [
        # 32 full tokens: two pages for four samples, and no page is shared once each has its own.
        ([list(range(3, 36))], 4, {}, 3),
        ([list(range(3, 36))], 1, {}, 0),
        # Two prompts with a page of common beginning, found by its tokens in a later step.
        (
            [[*range(3, 20)], [*range(3, 19), 50, 51]],
            1,
            {"max_num_seqs": 2, "max_num_batched_tokens": 17},
            1,
        ),
    ],
)
def test_shared_blocks_are_the_most_pages_that_stood_in_two_tables(
    engine_of: Any, spied: Any, prompts: Any, n: int, settings: Any, most: int
):
    stats = engine_of(**settings).rollout(prompts, sampling(6, n)).stats
    assert stats.shared_blocks == max(spied["shared"]) == most
    assert stats.peak_blocks == max(spied["used"])


def test_decoded_tokens_of_mixed_steps_are_told_apart(engine_of: Any, spied: Any):
    engine = engine_of(
        enable_mixed_steps=True, enable_chunked_prefill=True, max_num_batched_tokens=20
    )
    prompts = [[3, 4, 5], list(range(6, 60)), [7, 8]]
    stats = engine.rollout(prompts, sampling(9, 1)).stats
    assert stats.mixed_decode_tokens == sum(spied["mixed"]) > 0
    assert stats.decode_tokens == sum(spied["mixed"]) + sum(spied["decode"])
    # Each sequence's first token comes out of its prompt.
    assert stats.completion_tokens == stats.decode_tokens + len(prompts)


def test_a_phases_speed_is_its_own_tokens_over_its_own_seconds():
    stats = RolloutStats(
        prefill_tokens=90, mixed_decode_tokens=10, prefill_s=2.0, decode_tokens=70, decode_s=3.0
    )
    assert stats.prefill_tokens_per_s == 50.0
    assert stats.decode_tokens_per_s == 20.0


def test_speeds_of_a_call_that_took_no_step_are_zero(engine: Any):
    stats = engine.rollout([], sampling(4, 1)).stats
    assert stats.prefill_tokens_per_s == stats.decode_tokens_per_s == stats.tokens_per_s == 0.0
    assert RolloutStats().tokens_per_s == 0.0


def test_a_summary_is_one_line_with_the_calls_figures():
    stats = RolloutStats(
        path="fused", backend="triton", strategy="pinned", completion_tokens=1200, total_s=2.0,
        gather_s=0.25, sync_s=0.5, prefill_tokens=100, prefill_s=0.5, shared_tokens=48,
        decode_tokens=1100, decode_s=1.1, overrun_tokens=7, peak_blocks=31, shared_blocks=6,
        evicted_blocks=2, preemptions=3,
    )  # fmt: skip
    line = stats.summary()
    assert "\n" not in line
    for part in (
        "1200 tokens in 2.00 s (600.0 tokens/s)",
        "path fused, backend triton, weights pinned (gather 0.25 s, sync 0.50 s)",
        "prefill 0.50 s (100 tokens, 48 shared, 200.0 tokens/s)",
        "decode 1.10 s (1100 tokens, 7 overrun, 1,000.0 tokens/s)",
        "pages 31 used, 6 shared, 2 evicted, 3 preemptions",
    ):
        assert part in line


def test_one_rank_waits_for_nobody(engine: Any):
    assert engine.rollout([[3, 4]], sampling(3, 1)).stats.sync_s == 0.0
