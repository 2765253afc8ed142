"""Whose noise a token gets: seeds, uids, ranks and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import hybrid_engine, ragged_prompts, tokens

from tritonhybrid import SamplingParams

FREE = SamplingParams(max_new_tokens=16, temperature=1.0, n=2)
SEEDED = SamplingParams(max_new_tokens=16, temperature=1.0, n=2, seed=11)
FILTERED = SamplingParams(max_new_tokens=16, temperature=0.9, top_p=0.95, top_k=40, seed=11)

stages_0_and_3 = pytest.mark.parametrize("stage", [0, 3])


def unseeded_twice(stage: int) -> list[list[list[int]]]:
    engine = hybrid_engine(stage)
    prompts = [[5, 6, 7]] * 3
    return [tokens(engine.rollout(prompts, FREE)) for _ in range(2)]


@stages_0_and_3
def test_one_prompt_samples_differently_on_each_rank_and_in_each_rollout(ranks, stage):
    results = ranks(2).run(unseeded_twice, stage)
    samples = [tuple(s) for rank in results for rollout in rank for s in rollout]
    # 2 ranks, 2 rollouts, 3 copies of the prompt, 2 samples each: all different.
    assert len(set(samples)) == len(samples) == 24


def seeded_with_uids(stage: int, params: SamplingParams) -> list[list[int]]:
    """Eight prompts, dealt out to the ranks, each with a uid of its own."""
    engine = hybrid_engine(stage)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    prompts = ragged_prompts(8)
    mine = list(range(rank, 8, world_size))
    out = engine.rollout([prompts[i] for i in mine], params, uids=[100 + i for i in mine])
    return [[mine[c.prompt_index], c.sample_index, *c.token_ids] for c in out.completions]


@pytest.mark.parametrize("params", [SEEDED, FILTERED], ids=["plain", "filtered"])
def test_uids_make_samples_independent_of_world_size_and_stage(ranks, params):
    found = [
        sorted(
            sample
            for rank in ranks(world_size).run(seeded_with_uids, stage, params)
            for sample in rank
        )
        for world_size, stage in ((1, 0), (2, 0), (1, 3), (2, 3))
    ]
    assert len(found[0]) == 8 * params.n
    assert found[0] == found[1] == found[2] == found[3]


def one_rank_behaviour() -> dict[str, Any]:
    """Calls whose results are compared with each other."""
    engine = hybrid_engine(0)
    prompts = ragged_prompts(6)
    uids = list(range(6))
    together = tokens(engine.rollout(prompts, SEEDED, uids=uids))
    alone = [
        completion
        for prompt, uid in zip(prompts, uids, strict=True)
        for completion in tokens(engine.rollout([prompt], SEEDED, uids=[uid]))
    ]
    small = hybrid_engine(
        0, config={"max_num_seqs": 3, "max_num_batched_tokens": 8, "block_size": 4}
    )
    few_slots = tokens(small.rollout(prompts, SEEDED, uids=uids))
    # Pages for one long sequence and a little more: the others are set back and recomputed.
    page = 2 * 2 * 16 * 4 * 4 * 3
    tight = hybrid_engine(0, config={"kv_cache_bytes": 14 * page, "block_size": 4})
    preempted = tokens(tight.rollout(prompts, SEEDED, uids=uids))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    repeated = [tokens(engine.rollout(prompts, SEEDED)) for _ in range(2)]
    other_seed = tokens(
        engine.rollout(prompts, SamplingParams(max_new_tokens=16, temperature=1.0, n=2, seed=12))
    )
    free = [tokens(engine.rollout(prompts, FREE)) for _ in range(2)]
    return {
        "together": together,
        "alone": alone,
        "few_slots": few_slots,
        "preempted": preempted,
        "preemptions": tight.stats.preemptions,
        "repeated": repeated,
        "other_seed": other_seed,
        "free": free,
        "generator untouched": torch.equal(before, torch.get_rng_state()),
    }


@pytest.fixture(scope="module")
def behaviour(ranks):
    (result,) = ranks(1).run(one_rank_behaviour)
    return result


def test_samples_do_not_depend_on_the_batch_they_ran_in(behaviour):
    assert behaviour["alone"] == behaviour["together"]
    assert behaviour["few_slots"] == behaviour["together"]


def test_samples_do_not_depend_on_preemption(behaviour):
    assert behaviour["preemptions"] > 0
    assert behaviour["preempted"] == behaviour["together"]


def test_an_explicit_seed_repeats_the_call_and_another_does_not(behaviour):
    first, second = behaviour["repeated"]
    assert first == second
    assert first != behaviour["other_seed"]


def test_rollouts_without_a_seed_differ(behaviour):
    first, second = behaviour["free"]
    assert first != second


def test_rollout_leaves_torchs_generators_alone(behaviour):
    assert behaviour["generator untouched"]


def sampled_generate() -> dict[str, Any]:
    """``generate(do_sample=True)`` beside the draws it may take from torch's generator."""
    engine = hybrid_engine(0)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])

    def call(**kwargs: Any) -> list[list[int]]:
        return engine.generate(ids, max_new_tokens=12, **kwargs).tolist()

    torch.manual_seed(3)
    first, second = call(do_sample=True), call(do_sample=True)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    repeated = [call(do_sample=True), call(do_sample=True)]
    torch.manual_seed(3)
    for _ in range(2):
        torch.randint(2**62, (1,))
    drawn = torch.get_rng_state()
    call(do_sample=False)
    return {
        "first": first,
        "second": second,
        "repeated": repeated,
        "one draw a call": torch.equal(state, drawn),
        "greedy draws nothing": torch.equal(drawn, torch.get_rng_state()),
    }


def test_sampled_generate_repeats_under_manual_seed_and_takes_one_draw(ranks):
    (result,) = ranks(1).run(sampled_generate)
    assert result["first"] != result["second"]
    assert result["repeated"] == [result["first"], result["second"]]
    assert result["one draw a call"]
    assert result["greedy draws nothing"]
