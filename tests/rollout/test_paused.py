"""A rollout stops when its tokens are spent and goes on later, with the same or new weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tritonhybrid import ConfigError, EngineStateError, SamplingParams
from tritonhybrid.runner import Runner
from tritonhybrid.testing import hold

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]]
PARAMS = [
    SamplingParams(max_new_tokens=new, n=2, seed=3, ignore_eos=True, top_p=0.9)
    for new in (22, 3, 17)
]
TOTAL = 2 * (22 + 3 + 17)


def key(completion: Any) -> tuple[int, int]:
    return completion.prompt_index, completion.sample_index


def finished(out: Any) -> dict:
    return {key(c): c for c in out.completions if c.finish_reason != "budget"}


@pytest.mark.parametrize("budget", [1, 7, 30])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 3},
        {"kv_cache_bytes": 7 * 4 * 2 * 16 * 16 * 2, "max_num_seqs": 4},
        {"enable_mixed_steps": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 8},
    ],
    ids=["plain", "few slots", "few pages", "mixed chunks"],
)
def test_resumed_without_an_update_it_is_the_uninterrupted_rollout_bit_for_bit(
    engine_of: Any, budget: int, settings: dict
):
    whole = finished(engine_of(**settings).rollout(PROMPTS, PARAMS))
    engine = engine_of(**settings)
    out = engine.rollout(PROMPTS, PARAMS, token_budget=budget)
    pieces = finished(out)
    rounds = 0
    while out.paused is not None:
        rounds += 1
        assert [c.finish_reason for c in out.completions].count("budget") == len(
            out.paused.sequences
        )
        out = engine.resume(out.paused, token_budget=budget)
        pieces |= finished(out)
    assert rounds >= TOTAL // (budget + 6) - 1
    assert pieces.keys() == whole.keys()
    for k, c in whole.items():
        assert pieces[k].token_ids == c.token_ids
        assert pieces[k].logprobs == c.logprobs
        assert pieces[k].raw_logprobs == c.raw_logprobs
    blocks = engine.__dict__["_tritonhybrid"].generation.blocks
    assert blocks.num_used == 0


def test_what_is_cut_short_holds_what_was_sampled_so_far(engine: Any):
    whole = {key(c): c for c in engine.rollout(PROMPTS, PARAMS).completions}
    out = engine.rollout(PROMPTS, PARAMS, token_budget=20)
    assert [key(c) for c in out.completions] == sorted(whole)
    assert 20 <= out.stats.completion_tokens < 20 + 6
    assert out.paused.num_tokens == out.stats.completion_tokens - 2 * 3
    for c in out.completions:
        assert c.token_ids == whole[key(c)].token_ids[: len(c.token_ids)]
        assert (c.finish_reason == "budget") == (len(c.token_ids) < len(whole[key(c)].token_ids))


def test_other_calls_in_between_take_the_pages_and_change_no_token(engine: Any):
    whole = finished(engine.rollout(PROMPTS, PARAMS))
    out = engine.rollout(PROMPTS, PARAMS, token_budget=20)
    engine.rollout([[5] * 40], SamplingParams(max_new_tokens=20))
    engine.release_inference_cache()
    again = finished(engine.resume(out.paused))
    assert {k: c.token_ids for k, c in again.items()} == {k: whole[k].token_ids for k in again}
    assert len(again) == 4


def test_resumed_with_new_weights_each_token_says_which_weights_it_came_from(model: Any):
    own = copy.deepcopy(model)
    engine = hold(own, config={"block_size": 16})
    state = engine.__dict__["_tritonhybrid"]
    greedy = SamplingParams(max_new_tokens=14, temperature=0.0, ignore_eos=True)
    out = engine.rollout(PROMPTS, greedy, token_budget=15)
    before = [c.token_ids for c in out.completions]
    assert [c.policy_versions for c in out.completions] == [[0] * 5] * 3
    with torch.no_grad():
        own.model.layers[0].mlp.down_proj.weight.mul_(-1)
    state.use_new_weights(7)
    out = engine.resume(out.paused)
    assert [c.policy_versions for c in out.completions] == [[0] * 5 + [7] * 9] * 3
    for prompt, start, c in zip(PROMPTS, before, out.completions, strict=True):
        ids = [*prompt, *start]
        logprobs = []
        for _ in range(9):
            with torch.no_grad():
                scores = own(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
        assert c.token_ids == ids[len(prompt) :]
        assert c.logprobs[5:] == pytest.approx(logprobs, abs=2e-4)


def test_a_paused_rollout_is_resumed_once_and_by_its_own_engine(engine_of: Any):
    engine, other = engine_of(), engine_of()
    paused = engine.rollout(PROMPTS, PARAMS, token_budget=10).paused
    with pytest.raises(EngineStateError, match="another engine"):
        other.resume(paused)
    engine.resume(paused)
    with pytest.raises(EngineStateError, match="resumed before"):
        engine.resume(paused)


def test_a_resumption_that_fails_can_be_tried_again(engine: Any):
    whole = finished(engine.rollout(PROMPTS, PARAMS))
    paused = engine.rollout(PROMPTS, PARAMS, token_budget=10).paused
    norm = engine.module.model.norm.weight
    kept = norm.data.clone()
    norm.data[:] = float("nan")
    with pytest.raises(RuntimeError):
        engine.resume(paused)
    norm.data.copy_(kept)
    again = finished(engine.resume(paused))
    assert {k: c.token_ids for k, c in again.items()} == {k: whole[k].token_ids for k in again}


def test_a_resumption_that_fails_after_some_have_ended_does_not_run_them_on(
    engine_of: Any, monkeypatch: pytest.MonkeyPatch
):
    # One sequence at a time, which fills the one page but for its last token.
    engine = engine_of(kv_cache_bytes=4 * 2 * 16 * 16 * 2, max_num_seqs=1)
    params = [SamplingParams(max_new_tokens=n, seed=3, ignore_eos=True) for n in (14, 15)]
    whole = finished(engine.rollout(PROMPTS[:2], params))
    paused = engine.rollout(PROMPTS[:2], params, token_budget=5).paused
    execute = Runner.execute
    steps = iter(range(12))

    def fail_at_last(self: Runner, step: Any) -> Any:
        if next(steps) == 11:
            raise ZeroDivisionError
        return execute(self, step)

    monkeypatch.setattr(Runner, "execute", fail_at_last)
    with pytest.raises(ZeroDivisionError):
        engine.resume(paused)
    monkeypatch.setattr(Runner, "execute", execute)
    assert [s.is_finished for s in paused.sequences] == [True, False]
    again = finished(engine.resume(paused))
    assert {k: c.token_ids for k, c in again.items()} == {k: c.token_ids for k, c in whole.items()}


def test_a_rank_without_anything_left_resumes_nothing(engine: Any):
    out = engine.resume(None)
    assert out.completions == [] and out.paused is None


def test_a_stream_stops_at_its_budget_too(engine: Any):
    whole = finished(engine.rollout(PROMPTS, PARAMS))
    with engine.rollout_stream(PROMPTS, PARAMS, token_budget=30) as stream:
        first = {key(c): c for c in stream}
    assert {k[0] for k in first} == {1}
    rest = finished(engine.resume(stream.paused))
    assert {**first, **rest}.keys() == whole.keys()
    for k, c in {**first, **rest}.items():
        assert c.token_ids == whole[k].token_ids


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, "many"])
def test_a_budget_out_of_range_is_refused(engine: Any, budget: Any):
    with pytest.raises(ConfigError, match="token_budget"):
        engine.rollout(PROMPTS, PARAMS, token_budget=budget)
    assert len(engine.rollout(PROMPTS, PARAMS).completions) == 6
