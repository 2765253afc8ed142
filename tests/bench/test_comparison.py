"""The comparison: tokens are gated before speed, and a peer that fails is a result."""

from __future__ import annotations

import time

import pytest
from comparison import Contestant, Field, GateError, compare, rows_of
from gate import agreement, first_difference
from provider import Provider
from timing import interleave
from workloads import WORKLOADS, log_normal_lengths

TOKENS = [[5, 6, 7], [8, 9, 10]]
WORKLOAD = WORKLOADS["batch_1"]


class Alone:
    """A single rank agrees with itself."""

    def synchronize(self):
        pass

    def every(self, flag):
        return flag

    def slowest(self, seconds):
        return seconds


def answering(name, tokens, calls=None, seconds=0.0):
    def run():
        time.sleep(seconds)
        if calls is not None:
            calls.append(name)
        return tokens

    return Contestant(name, lambda: Provider(name=name, run=run))


def raising(name, error, after=0):
    left = [after]

    def run():
        if left[0] == 0:
            raise error
        left[0] -= 1
        return TOKENS

    return Contestant(name, lambda: Provider(name=name, run=run))


def outcome_of(*contestants, dtype="fp32", rounds=3):
    return compare(lambda dtype: Field(list(contestants)), dtype, rounds, Alone())


def rows_by_provider(outcome):
    rows = {}
    for row in rows_of(outcome, WORKLOAD, "fp32"):
        rows.setdefault(row.provider, []).append(row)
    return rows


def test_a_provider_with_other_tokens_gets_neither_speed_nor_ratio():
    calls = []
    wrong = answering("tritonhybrid[zero0]", [[5, 6, 7], [8, 1, 10]], calls)
    rows = rows_by_provider(outcome_of(answering("hf_generate", TOKENS), wrong))
    assert [row.metric for row in rows["tritonhybrid[zero0]"]] == [
        "gate failed: sequence 1, token 1: expected 9, got 1 (fp32 greedy)"
    ]
    assert calls == ["tritonhybrid[zero0]"], "it ran for the gate and was never timed"
    assert not [provider for provider in rows if "/" in provider]


def test_ratios_are_taken_round_by_round_over_every_peer_that_agrees():
    rows = rows_by_provider(
        outcome_of(
            answering("hf_generate", TOKENS, seconds=0.03),
            answering("tritonhybrid[zero0]", TOKENS, seconds=0.01),
            raising("peer", ValueError("not this model")),
        )
    )
    ratio = rows["tritonhybrid[zero0] / hf_generate"][0]
    assert (ratio.metric, ratio.unit) == ("speedup", "x")
    assert ratio.figures.p20 <= ratio.figures.p50 <= ratio.figures.p80
    assert rows["peer"][0].metric.startswith("failed: ValueError: not this model (test_comparison")
    assert "tritonhybrid[zero0] / peer" not in rows


def test_a_provider_that_fails_while_timed_keeps_its_row_and_loses_its_ratio():
    rows = rows_by_provider(
        outcome_of(
            answering("hf_generate", TOKENS),
            answering("tritonhybrid[zero0]", TOKENS),
            raising("peer", RuntimeError("gone"), after=2),
        )
    )
    assert any(row.metric.startswith("failed while timed: RuntimeError") for row in rows["peer"])
    assert "tritonhybrid[zero0] / peer" not in rows


def test_a_contestant_that_cannot_be_made_is_a_failed_row():
    def make():
        raise ModuleNotFoundError("No module named 'peer'")

    outcome = outcome_of(answering("hf_generate", TOKENS), Contestant("peer", make))
    assert outcome.failures["peer"].startswith("failed: ModuleNotFoundError: No module named")


def test_what_runs_in_the_background_is_ended_for_winners_and_losers_alike():
    ended = []

    def contestant(name, tokens):
        def make():
            return Provider(name=name, run=lambda: tokens, close=lambda: ended.append(name))

        return Contestant(name, make)

    outcome_of(contestant("hf_generate", TOKENS), contestant("peer", [[1]]))
    assert sorted(ended) == ["hf_generate", "peer"]


def test_without_the_reference_nothing_is_compared():
    with pytest.raises(GateError, match="the reference hf_generate failed: OSError: no weights"):
        outcome_of(raising("hf_generate", OSError("no weights")), answering("peer", TOKENS))


def test_bf16_is_gated_in_fp32_and_reports_its_own_agreement():
    events = []

    def field_of(dtype):
        events.append(f"made {dtype}")
        tokens = TOKENS if dtype == "fp32" else [[5, 6, 7], [8, 1, 10]]
        contestants = [answering("hf_generate", TOKENS), answering("peer", tokens)]
        return Field(contestants, lambda: events.append(f"freed {dtype}"))

    outcome = compare(field_of, "bf16", 2, Alone())
    assert outcome.failures == {}
    assert outcome.agreement["peer"] == pytest.approx(4 / 6)
    assert len(outcome.seconds["peer"]) == 2
    assert events == ["made fp32", "freed fp32", "made bf16", "freed bf16"]


def test_rounds_are_interleaved_and_start_one_further_each_time():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    interleave(calls, 3, timer=lambda call: call() or 1.0)
    assert "".join(order) == "abcbcacab"


def test_difference_names_length_and_place():
    assert first_difference(TOKENS, TOKENS) is None
    assert first_difference(TOKENS, TOKENS[:1]) == "expected 2 sequences, got 1"
    assert first_difference(TOKENS, [[5, 6], [8, 9, 10]]) == "sequence 0: expected 3 tokens, got 2"
    assert agreement(TOKENS, [[5, 0, 7], [8, 9, 10]]) == pytest.approx(4 / 6)


def test_long_tail_spans_its_ends_and_most_sequences_are_short():
    lengths = log_normal_lengths(32, 6, 160)
    assert (min(lengths), max(lengths), len(lengths)) == (6, 160, 32)
    assert sorted(lengths)[16] < 40
    assert lengths != tuple(sorted(lengths))
