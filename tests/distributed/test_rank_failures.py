"""Two ranks that fare differently: nothing hangs, and each hears of the other's failure."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from failures import (
    GREEDY,
    PROMPTS,
    acting,
    aftermath,
    caught,
    fail,
    press_ctrl_c,
    rank,
    rollout_beside_hf,
)
from models import (
    VOCAB,
    hf_greedy,
    hybrid_engine,
    micro_step,
    plain_copy,
    ragged_prompts,
    tokens,
)

from tritonhybrid import HybridConfig, SamplingParams
from tritonhybrid.runner import Runner


def unlike_ranks(stage: int) -> dict[str, Any]:
    """Ranks with other prompt counts, lengths and ends; one without prompts at all."""
    engine = hybrid_engine(stage)
    mine = ragged_prompts(5, seed=rank()) if rank() == 0 else []
    empty = engine.rollout(mine, GREEDY)
    long_or_short = SamplingParams(max_new_tokens=20 if rank() == 0 else 2, temperature=0.0)
    unequal = engine.rollout(PROMPTS, long_or_short)
    steps = engine.stats.num_decode_steps
    first = unequal.completions[0].token_ids
    ended = engine.rollout(
        PROMPTS[:1], SamplingParams(max_new_tokens=20, temperature=0.0, eos_token_id=first[1])
    )
    copy = plain_copy(engine)
    return {
        "empty": tokens(empty),
        "hf_empty": hf_greedy(copy, mine, 8),
        "unequal": tokens(unequal),
        "hf_unequal": hf_greedy(copy, PROMPTS, long_or_short.max_new_tokens),
        "steps": steps,
        "ended": ended.completions[0],
        "ended_steps": ended.stats.num_decode_steps,
        "loss": micro_step(engine, 0),
    }


@pytest.mark.parametrize("stage", [0, 3])
def test_ragged_lengths_and_empty_prompts_never_hang(ranks, stage):
    results = ranks(2).run(unlike_ranks, stage)
    assert results[1]["empty"] == []
    for result in results:
        assert result["empty"] == result["hf_empty"]
        assert result["unequal"] == result["hf_unequal"]
        # No rank takes a step past its longest live sequence; its first token is the prefill's.
        assert result["steps"] == max(map(len, result["unequal"])) - 1
        assert result["ended"].token_ids == result["unequal"][0][: len(result["ended"].token_ids)]
        assert result["ended"].finish_reason == "stop"
        assert result["ended_steps"] == len(result["ended"].token_ids) - 1
    assert len(results[0]["unequal"][0]) > len(results[1]["unequal"][0])


# Pages of four tokens: keys and values of 3 layers, 2 heads of 16 numbers of 4 bytes.
PAGE_BYTES = 4 * 2 * 3 * 2 * 16 * 4


def one_rank_refuses(stage: int, case: str) -> dict[str, Any]:
    """Rank 1 passes an argument that is refused, rank 0 a good one."""
    engine = hybrid_engine(stage, config={"block_size": 4, "kv_cache_bytes": 12 * PAGE_BYTES})
    is_bad = rank() == 1
    ids = torch.tensor([[5, 6, 7]])
    calls = {
        "token out of range": lambda: engine.rollout([[5, VOCAB if is_bad else 6]], GREEDY),
        "empty prompt": lambda: engine.rollout([[5], []] if is_bad else [[5]], GREEDY),
        "too long": lambda: engine.rollout(
            [[5]], SamplingParams(max_new_tokens=1000 if is_bad else 4)
        ),
        "longer than the cache": lambda: engine.rollout([[5] * (45 if is_bad else 40)], GREEDY),
        "a uid twice": lambda: engine.rollout(PROMPTS[:2], GREEDY, uids=[7, 7 if is_bad else 8]),
        "all tokens masked": lambda: engine.rollout(
            PROMPTS[:2],
            SamplingParams(
                max_new_tokens=6, suppress_tokens=tuple(range(VOCAB if is_bad else VOCAB - 1))
            ),
        ),
        "budget of nothing": lambda: engine.rollout([[5]], GREEDY, token_budget=int(not is_bad)),
        "unknown generate argument": lambda: engine.generate(
            ids, max_new_tokens=3, **({"no_such_argument": 1} if is_bad else {})
        ),
        "generate without room": lambda: engine.generate(
            ids, max_length=3 if is_bad else 9, do_sample=False
        ),
        "beam search without beams": lambda: engine.generate(
            ids, max_new_tokens=3, do_sample=False, num_return_sequences=2 if is_bad else 1
        ),
    }
    found = aftermath(engine, calls[case])
    return {**found, "loss": micro_step(engine, 0), **rollout_beside_hf(engine)}


def healthy_loss(stage: int) -> float:
    return micro_step(hybrid_engine(stage), 0)


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("token out of range", "ConfigError: Prompt 0 holds a token id outside the vocabulary"),
        ("empty prompt", "ConfigError: Prompt 1 is empty"),
        ("too long", "ConfigError: Prompt 0 plus max_new_tokens exceeds max_position_embeddings"),
        ("longer than the cache", "CacheExhaustedError: A sequence must fit the key-value cache"),
        ("a uid twice", "ConfigError: uids are distinct"),
        ("all tokens masked", "NonFiniteLogitsError: Sampling needs finite logits"),
        ("budget of nothing", "ConfigError: token_budget is out of range"),
        ("unknown generate argument", "ValueError: "),
        ("generate without room", "ValueError: "),
        ("beam search without beams", "ValueError: "),
    ],
)
def test_an_argument_refused_on_one_rank_is_a_rank_failure_on_the_other(ranks, case, error):
    pool = ranks(2)
    good, bad = pool.run(one_rank_refuses, 3, case)
    assert bad["error"].startswith(error)
    assert good["error"].startswith(
        f"RankFailureError: rank 1 failed during a collective rollout: {error}"
    )
    for result, loss in zip((good, bad), pool.run(healthy_loss, 3), strict=True):
        assert result["changed"] == []
        assert result["tokens"] == result["hf_tokens"]
        assert result["loss"] == loss


def test_resident_ranks_owe_each_other_nothing(ranks):
    """In ZeRO-0 a refusal on one rank is that rank's own affair."""
    good, bad = ranks(2).run(one_rank_refuses, 0, "empty prompt")
    assert bad["error"].startswith("ConfigError: Prompt 1 is empty")
    assert good["error"] == "nothing"
    for result in (good, bad):
        assert result["tokens"] == result["hf_tokens"]


def resident_ranks_call_unequally() -> list[list[list[int]]]:
    engine = hybrid_engine(0)
    return [tokens(engine.rollout(PROMPTS, GREEDY)) for _ in range(1 + 2 * rank())]


def test_resident_ranks_may_call_unequally_often(ranks):
    one, three = ranks(2).run(resident_ranks_call_unequally)
    assert len(one) == 1
    assert three == one * 3


def one_rank_breaks_down(kind: str) -> dict[str, Any]:
    """Rank 1 fails in its third step, each rank goes on to train and to roll out."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = hybrid_engine(3)
    engine_state = engine.__dict__["_tritonhybrid"]

    def spoil_pages() -> None:
        for values in engine_state.generation.cache.values:
            values.fill_(float("nan"))

    act = {"error": fail, "ctrl_c": press_ctrl_c, "nan": spoil_pages}[kind]
    with acting(Runner, "execute", 3, act):
        found = aftermath(engine, lambda: engine.rollout(PROMPTS, GREEDY))
    return {**found, "loss": micro_step(engine, 0), **rollout_beside_hf(engine)}


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("error", "ZeroDivisionError: on purpose"),
        ("ctrl_c", "KeyboardInterrupt:"),
        ("nan", "NonFiniteLogitsError: Sampling needs finite logits"),
    ],
)
def test_one_rank_raising_midway_never_hangs(ranks, kind, error):
    pool = ranks(2)
    good, bad = pool.run(one_rank_breaks_down, kind)
    assert bad["error"].startswith(error)
    assert good["error"].startswith("RankFailureError: rank 1 failed")
    assert error in good["error"]
    for result, loss in zip((good, bad), pool.run(healthy_loss, 3), strict=True):
        assert result["changed"] == []
        assert result["tokens"] == result["hf_tokens"]
        assert result["loss"] == loss


def weights_turn_bad_everywhere() -> str:
    engine = hybrid_engine(3)
    engine.rollout(PROMPTS, GREEDY)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.ds_tensor.fill_(float("nan"))
    return caught(lambda: engine.rollout(PROMPTS if rank() == 0 else [], GREEDY)).error


def test_non_finite_logits_reach_the_rank_without_prompts(ranks):
    with_prompts, without = ranks(2).run(weights_turn_bad_everywhere)
    assert with_prompts.startswith("NonFiniteLogitsError: ")
    assert "for prompt 0 at position" in with_prompts
    assert without.startswith("RankFailureError: rank 0 failed")
    assert "NonFiniteLogitsError" in without


def no_cache_at_all() -> dict[str, Any]:
    engine = hybrid_engine(3, config={"kv_cache_bytes": 100})
    error = caught(lambda: engine.rollout(PROMPTS if rank() == 1 else [], GREEDY)).error
    return {"error": error, "loss": micro_step(engine, 0)}


def test_a_cache_smaller_than_a_page_is_told_to_the_rank_without_prompts(ranks):
    pool = ranks(2)
    without, with_prompts = pool.run(no_cache_at_all)
    own = "CacheExhaustedError: The key-value cache needs at least one page"
    assert with_prompts["error"].startswith(own)
    assert without["error"].startswith(
        f"RankFailureError: rank 1 failed during a collective rollout: {own}"
    )
    losses = pool.run(healthy_loss, 3)
    assert [without["loss"], with_prompts["loss"]] == losses


def one_rank_stays_away() -> str:
    engine = hybrid_engine(3, config=HybridConfig(sync_timeout_s=2.0))
    if rank() == 1:
        return "stayed away"
    return caught(lambda: engine.rollout(PROMPTS, GREEDY)).error


def test_a_rank_that_stays_away_ends_in_an_error_within_the_timeout(ranks):
    waited, away = ranks(2).run(one_rank_stays_away)
    assert away == "stayed away"
    assert waited.startswith(
        "EngineStateError: Every rank takes part in a ZeRO-3 call: expected 2 ranks within "
        "sync_timeout_s = 2 s, got "
    )
