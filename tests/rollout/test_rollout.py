"""``rollout``: whose noise a token has, how pages are used, what comes back in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tritonhybrid import CacheExhaustedError, NonFiniteLogitsError, SamplingParams

PROMPTS = [[5, 6, 7, 8, 9], [10] * 33, [11, 12], [13] * 16, [14] * 17]
SAMPLED = SamplingParams(max_new_tokens=20, n=3, seed=1, ignore_eos=True)
GREEDY = SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True)
# One page of 16 tokens: 2 layers, keys and values, 2 heads of 8 in fp32.
PAGE_BYTES = 2 * 2 * 16 * 2 * 8 * 4


def tokens(output: Any) -> list[list[int]]:
    return [completion.token_ids for completion in output.completions]


def fp64_logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    table = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return table.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def test_completions_come_n_a_prompt_adjacent_in_input_order(engine: Any):
    params = [SamplingParams(max_new_tokens=3 + i, n=1 + i % 3, seed=0) for i in range(5)]
    out = engine.rollout(PROMPTS, params)
    order = [(c.prompt_index, c.sample_index) for c in out.completions]
    assert order == [(i, s) for i in range(5) for s in range(1 + i % 3)]
    assert all(len(c.token_ids) <= 3 + c.prompt_index for c in out.completions)
    assert all(len(c.token_ids) == len(c.logprobs) == len(c.raw_logprobs) for c in out.completions)


def test_logprobs_of_samples_are_those_of_hugging_faces_forward(engine: Any, model: Any):
    tempered = SamplingParams(max_new_tokens=20, n=3, seed=1, ignore_eos=True, temperature=0.7)
    for params in (SAMPLED, tempered):
        for completion in engine.rollout(PROMPTS, params).completions:
            prompt = PROMPTS[completion.prompt_index]
            exact = fp64_logprobs(model, prompt, completion.token_ids)
            raw = torch.tensor(completion.raw_logprobs, dtype=torch.float64)
            assert float((raw - exact).abs().max()) < 2e-4
            equal = completion.logprobs == pytest.approx(completion.raw_logprobs, abs=1e-6)
            assert equal == (params.temperature == 1)


def test_samples_do_not_depend_on_the_batch_they_ran_in(engine_of: Callable[..., Any]):
    together = engine_of().rollout(PROMPTS, SAMPLED, uids=[7, 8, 9, 10, 11])
    alone = [engine_of().rollout([p], SAMPLED, uids=[7 + i]) for i, p in enumerate(PROMPTS)]
    assert tokens(together) == [row for out in alone for row in tokens(out)]
    turned = engine_of(max_num_seqs=2, max_num_batched_tokens=8).rollout(
        PROMPTS[::-1], SAMPLED, uids=[11, 10, 9, 8, 7]
    )
    assert sorted(tokens(turned)) == sorted(tokens(together))


def test_a_seed_repeats_a_call_and_without_one_calls_differ(engine_of: Callable[..., Any]):
    engine = engine_of()
    first = engine.rollout(PROMPTS, SAMPLED)
    assert tokens(engine.rollout(PROMPTS, SAMPLED)) == tokens(first)
    unseeded = SamplingParams(max_new_tokens=20, n=3)
    calls = [tokens(engine.rollout(PROMPTS, unseeded)) for _ in range(2)]
    assert all(a != b for a, b in zip(*calls, strict=True))
    other = SamplingParams(max_new_tokens=20, n=3, seed=2, ignore_eos=True)
    assert tokens(engine.rollout(PROMPTS, other)) != tokens(first)


def test_samples_of_a_prompt_and_equal_prompts_of_a_call_differ(engine: Any):
    out = engine.rollout([PROMPTS[0], PROMPTS[0]], SAMPLED)
    assert len({tuple(row) for row in tokens(out)}) == 6
    with_uids = engine.rollout([PROMPTS[0], PROMPTS[0]], SAMPLED, uids=[0, 1])
    assert tokens(with_uids) == tokens(out)
    swapped = engine.rollout([PROMPTS[0], PROMPTS[0]], SAMPLED, uids=[1, 0])
    assert tokens(swapped) == tokens(out)[3:] + tokens(out)[:3]


def test_neighbouring_seeds_share_no_sample(engine: Any):
    seen = set()
    for seed in range(4):
        params = SamplingParams(max_new_tokens=12, n=4, seed=seed, ignore_eos=True)
        seen |= {tuple(row) for row in tokens(engine.rollout([PROMPTS[0]], params))}
    assert len(seen) == 16


def test_torchs_generators_are_not_touched(engine: Any):
    before = torch.get_rng_state()
    engine.rollout(PROMPTS, SamplingParams(max_new_tokens=4, n=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_are_lists_or_rows_of_a_tensor_with_or_without_padding(engine: Any):
    listed = engine.rollout([[5, 6, 7], [8, 9, 10]], GREEDY)
    tensor = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert tokens(engine.rollout(tensor, GREEDY)) == tokens(listed)
    assert tokens(engine.rollout(list(tensor), GREEDY)) == tokens(listed)
    padded = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]])
    assert tokens(engine.rollout(padded, GREEDY, attention_mask=mask)) == tokens(listed)
    # Without a mask every column is a token.
    assert tokens(engine.rollout(padded, GREEDY)) == tokens(
        engine.rollout([[0, 5, 6, 7], [0, 8, 9, 10]], GREEDY)
    )


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_tiny_cache_preempts_and_gives_the_same_tokens(
    engine_of: Callable[..., Any], params: SamplingParams
):
    plenty = engine_of().rollout(PROMPTS, params)
    assert plenty.stats.preemptions == 0
    tiny = engine_of(kv_cache_bytes=6 * PAGE_BYTES)
    out = tiny.rollout(PROMPTS, params)
    assert out.stats.kv_bytes == 6 * PAGE_BYTES
    assert out.stats.preemptions > 0 and out.stats.peak_blocks <= 6
    assert tokens(out) == tokens(plenty)
    for ours, theirs in zip(out.completions, plenty.completions, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert tokens(tiny.rollout(PROMPTS, params)) == tokens(plenty)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_cache_of_automatic_size_holds_equal_prompts_of_which_one_grows_longest(
    engine_of: Callable[..., Any], num_slots: int
):
    params = [SamplingParams(max_new_tokens=n, temperature=0.0, ignore_eos=True) for n in (1, 40)]
    prompts = [PROMPTS[1], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    engine = engine_of(max_num_seqs=num_slots, block_size=2)
    out = engine.rollout(prompts, params * 2)
    assert engine.stats.preemptions == 0
    assert tokens(out) == tokens(engine_of().rollout(prompts, params * 2))


def test_a_sequence_too_long_for_the_cache_is_refused_and_the_engine_goes_on(
    engine_of: Callable[..., Any],
):
    engine = engine_of(kv_cache_bytes=2 * PAGE_BYTES)
    with pytest.raises(CacheExhaustedError, match="at most 32 tokens"):
        engine.rollout([[5, 6], [10] * 33], GREEDY)
    with pytest.raises(CacheExhaustedError, match="at least one page"):
        engine_of(kv_cache_bytes=10).rollout([[5]], GREEDY)
    assert tokens(engine.rollout([[5, 6]], GREEDY)) == tokens(engine_of().rollout([[5, 6]], GREEDY))


@pytest.mark.parametrize("settings", [{"max_num_seqs": 2}, {"max_num_batched_tokens": 1}])
def test_limits_on_a_step_change_no_token(engine_of: Callable[..., Any], settings: dict):
    assert tokens(engine_of(**settings).rollout(PROMPTS, SAMPLED)) == tokens(
        engine_of().rollout(PROMPTS, SAMPLED)
    )


@pytest.mark.parametrize("block_size", [1, 3, 16, "auto"])
def test_the_size_of_a_page_changes_no_token(engine_of: Callable[..., Any], block_size: Any):
    assert tokens(engine_of(block_size=block_size).rollout(PROMPTS, SAMPLED)) == tokens(
        engine_of().rollout(PROMPTS, SAMPLED)
    )


def test_prompt_pages_are_computed_once_for_all_samples(engine: Any):
    stats = engine.rollout([[10] * 40], SamplingParams(max_new_tokens=4, n=8, seed=0)).stats
    assert (stats.prompt_tokens, stats.prefill_tokens) == (40, 40)
    assert stats.num_prefill_steps == 1
    # Two full pages shared, the third copied by each but one.
    assert stats.peak_blocks == 2 + 8


def test_stats_count_what_was_done(engine: Any):
    out = engine.rollout(PROMPTS, GREEDY)
    stats = out.stats
    assert stats is engine.stats
    assert (stats.path, stats.backend, stats.strategy) == ("fused", "torch", "resident")
    assert stats.sampler == "argmax"
    assert stats.prompt_tokens == stats.prefill_tokens == sum(map(len, PROMPTS))
    assert stats.completion_tokens == 5 * 20
    assert (stats.num_prefill_steps, stats.num_decode_steps) == (1, 19)
    assert stats.total_s >= stats.prefill_s + stats.decode_s > 0
    assert stats.tokens_per_s == pytest.approx(100 / stats.total_s)
    assert stats.gather_bytes == stats.extra_weight_bytes == 0
    assert stats.notes == []


def test_an_empty_list_of_prompts_gives_no_completions(engine: Any):
    assert engine.rollout([], GREEDY).completions == []


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_name_the_prompt_and_the_engine_goes_on(
    engine: Any, model: Any, params: SamplingParams
):
    expected = tokens(engine.rollout(PROMPTS, params))
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        kept = weight[13].clone()
        weight[13] = float("nan")
    try:
        with pytest.raises(NonFiniteLogitsError) as caught:
            engine.rollout(PROMPTS, params)
    finally:
        with torch.no_grad():
            weight[13] = kept
    assert (caught.value.prompt_index, caught.value.position) == (3, 16)
    assert engine.stats.num_prefill_steps == 0
    assert tokens(engine.rollout(PROMPTS, params)) == expected


def test_top_logprobs_and_entropy_come_for_each_token_through_preemption_too(
    engine_of: Callable[..., Any], model: Any
):
    params = SamplingParams(
        max_new_tokens=20, seed=1, ignore_eos=True, top_p=0.9, top_logprobs=3, entropy=True
    )
    plain = SamplingParams(max_new_tokens=20, seed=1, ignore_eos=True, top_p=0.9)
    engine = engine_of(kv_cache_bytes=6 * PAGE_BYTES)
    out = engine.rollout(PROMPTS, params)
    assert out.stats.preemptions > 0
    assert tokens(out) == tokens(engine_of().rollout(PROMPTS, plain))
    for completion in out.completions:
        prompt = PROMPTS[completion.prompt_index]
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        exact = logits.double().log_softmax(-1)
        best = exact.topk(3)
        assert len(completion.top_logprobs) == len(completion.entropies) == 20
        ours = torch.tensor([[value for _, value in top] for top in completion.top_logprobs])
        assert float((ours.double() - best.values).abs().max()) < 2e-4
        ids_of = [[token for token, _ in top] for top in completion.top_logprobs]
        assert ids_of == best.indices.tolist()
        entropies = torch.tensor(completion.entropies, dtype=torch.float64)
        assert float((entropies + (exact.exp() * exact).sum(-1)).abs().max()) < 5e-4
    assert all(
        c.top_logprobs == c.entropies == [] for c in engine.rollout([[5]], plain).completions
    )


def test_penalties_and_forbidden_tokens_are_the_same_through_preemption(
    engine_of: Callable[..., Any],
):
    params = SamplingParams(
        max_new_tokens=20,
        n=2,
        seed=3,
        ignore_eos=True,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        bad_words_ids=[[10, 10], [7]],
        suppress_tokens=[3],
        forced_eos_token_id=2,
    )
    plenty = engine_of().rollout(PROMPTS, params)
    tiny = engine_of(kv_cache_bytes=6 * PAGE_BYTES).rollout(PROMPTS, params)
    assert tiny.stats.preemptions > 0
    assert tokens(tiny) == tokens(plenty)
    for row in tokens(plenty):
        assert row[-1] == 2 and not {3, 7} & set(row)
