"""Pages that hold what a later prompt begins with serve it, until the weights change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tritonhybrid import SamplingParams
from tritonhybrid.testing import hold

GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
PREFIX = [3 + i % 90 for i in range(40)]
PROMPTS = [[*PREFIX, 7, 8], [*PREFIX, 9], [5, 6, 7], [*PREFIX[:20], 11, 12, 13]]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Hugging Face's likeliest tokens, every one by a forward over all before it."""
    ids = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def expected(model: Any) -> list[list[int]]:
    return [greedy(model, prompt) for prompt in PROMPTS]


def tokens(out: Any) -> list[list[int]]:
    return [completion.token_ids for completion in out.completions]


def test_a_common_beginning_is_computed_once_in_a_call(engine: Any, expected: Any):
    out = engine.rollout(PROMPTS, GREEDY)
    assert tokens(out) == expected
    # Pages of 16: two of the first prompt's serve the second, one the last.
    assert out.stats.shared_tokens == 32 + 16
    assert out.stats.prefill_tokens == sum(map(len, PROMPTS)) - 48


def test_a_second_call_computes_only_what_no_page_holds(engine: Any, expected: Any):
    first = engine.rollout(PROMPTS, GREEDY)
    again = engine.rollout(PROMPTS, GREEDY)
    assert tokens(again) == tokens(first) == expected
    assert again.stats.prefill_tokens == (42 - 32) + (41 - 32) + 3 + (23 - 16)
    # A second turn finds the first one's completion as well as its prompt.
    turn = [*PROMPTS[0], *expected[0], 4, 4]
    out = engine.rollout([turn], GREEDY)
    assert out.stats.prefill_tokens == len(turn) - 48
    assert tokens(out) == [greedy(engine.module, turn)]


def edit_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def edit_behind_autograds_back(model: Any) -> None:
    model.model.embed_tokens.weight.data[PREFIX[0]] += 0.3


def exchange_storage(model: Any) -> None:
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data = weight.data.flip(0).contiguous()


def scale_residuals(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


@pytest.mark.parametrize(
    "edit", [edit_in_place, edit_behind_autograds_back, exchange_storage, scale_residuals]
)
def test_pages_of_other_weights_are_never_read(model: Any, edit: Any):
    own = copy.deepcopy(model)
    engine = hold(own, config={"block_size": 16})
    engine.rollout(PROMPTS, GREEDY)
    edit(own)
    out = engine.rollout(PROMPTS, GREEDY)
    assert tokens(out) == [greedy(own, prompt) for prompt in PROMPTS]
    assert out.stats.prefill_tokens == sum(map(len, PROMPTS)) - 48


def test_prefix_caching_can_be_turned_off(engine_of: Any, expected: Any):
    engine = engine_of(enable_prefix_caching=False)
    for _ in range(2):
        out = engine.rollout(PROMPTS, GREEDY)
        assert tokens(out) == expected
        assert out.stats.shared_tokens == 0
        assert out.stats.prefill_tokens == sum(map(len, PROMPTS))


def test_released_pages_are_computed_anew(engine: Any, expected: Any):
    engine.rollout(PROMPTS, GREEDY)
    engine.release_inference_cache()
    out = engine.rollout(PROMPTS, GREEDY)
    assert tokens(out) == expected
    assert out.stats.shared_tokens == 48


def test_a_larger_call_keeps_what_the_pages_of_a_smaller_one_hold(engine: Any, expected: Any):
    engine.rollout(PROMPTS[:1], GREEDY)
    before = engine.stats.kv_bytes
    out = engine.rollout(PROMPTS, SamplingParams(max_new_tokens=40, temperature=0.0))
    assert out.stats.kv_bytes > before
    assert out.stats.prefill_tokens == (42 - 32) + (41 - 32) + 3 + (23 - 16)
    assert [row[: len(ids)] for row, ids in zip(expected, tokens(out), strict=True)] == [
        ids[:8] for ids in tokens(out)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 7},
        {"enable_mixed_steps": True, "max_num_batched_tokens": 30, "max_num_seqs": 3},
        {
            "enable_mixed_steps": True,
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 9,
            "max_num_seqs": 3,
        },
        {"scheduling_policy": "longest_first", "max_num_seqs": 2},
    ],
    ids=["chunks", "mixed", "mixed chunks", "longest first"],
)
def test_how_steps_are_made_changes_no_token(engine_of: Any, expected: Any, settings: dict):
    sampled = SamplingParams(max_new_tokens=12, n=3, seed=5, top_p=0.9)
    plain = engine_of().rollout(PROMPTS, sampled)
    engine = engine_of(**settings)
    assert tokens(engine.rollout(PROMPTS, GREEDY)) == expected
    out = engine.rollout(PROMPTS, sampled)
    assert tokens(out) == tokens(plain)
    for ours, theirs in zip(out.completions, plain.completions, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "half", True])
def test_a_share_of_memory_out_of_range_is_refused(engine_of: Any, share: Any):
    with pytest.raises(ValueError, match="kv_cache_share"):
        engine_of(kv_cache_share=share)


def test_an_unknown_scheduling_policy_is_refused(engine_of: Any):
    with pytest.raises(ValueError, match="scheduling_policy"):
        engine_of(scheduling_policy="shortest_first")


def test_a_share_too_small_for_a_page_is_refused_and_names_the_cure(engine_of: Any):
    engine = engine_of(kv_cache_share=1e-12)
    with pytest.raises(RuntimeError, match="at least one page.*kv_cache_share"):
        engine.rollout(PROMPTS, GREEDY)
