"""How a completion ends: EOS, stop tokens, stop strings, lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tritonhybrid import ConfigError, SamplingParams

PROMPT = [5, 6, 7, 8, 9]


class Letters:
    """A tokenizer stub: every token but EOS is a letter and a digit."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return "".join(f"{chr(97 + i % 26)}{i // 26}" for i in ids if i != 2)


def greedy(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 12, "temperature": 0.0, **settings})


def only(output: Any) -> Any:
    (completion,) = output.completions
    return completion


@pytest.fixture
def free(engine: Any) -> list[int]:
    """Twelve greedy tokens that nothing ends; their first occurrences are known."""
    completion = only(engine.rollout([PROMPT], greedy(ignore_eos=True)))
    assert completion.finish_reason == "length"
    assert len(set(completion.token_ids)) > 4
    return completion.token_ids


def first_at(tokens: list[int], least: int) -> int:
    """An index from ``least`` on whose token has not come before."""
    return next(i for i in range(least, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.mark.parametrize("how", ["eos_token_id", "eos_list", "stop_token_ids", "config"])
def test_an_end_token_ends_at_once_and_is_the_last_token(
    engine: Any, model: Any, free: list[int], how: str, monkeypatch: pytest.MonkeyPatch
):
    at = first_at(free, 3)
    settings: dict[str, Any] = {
        "eos_token_id": {"eos_token_id": free[at]},
        "eos_list": {"eos_token_id": [99, free[at]]},
        "stop_token_ids": {"stop_token_ids": (free[at],), "ignore_eos": True},
        "config": {},
    }[how]
    if how == "config":
        monkeypatch.setattr(model.generation_config, "eos_token_id", [free[at], 2])
    completion = only(engine.rollout([PROMPT], greedy(**settings)))
    assert completion.token_ids == free[: at + 1]
    assert completion.finish_reason == "stop"
    assert len(completion.logprobs) == at + 1
    assert engine.stats.num_decode_steps == at


def test_eos_of_the_call_takes_the_place_of_the_configs(engine: Any, model: Any, free: list[int]):
    at = first_at(free, 2)
    named = only(engine.rollout([PROMPT], greedy(eos_token_id=[])))
    assert named.token_ids == free
    model_end = only(engine.rollout([PROMPT], greedy(eos_token_id=free[at])))
    assert model_end.token_ids == free[: at + 1]


def test_ignore_eos_samples_on_past_it_but_not_past_stop_tokens(engine: Any, free: list[int]):
    early, late = first_at(free, 1), first_at(free, first_at(free, 1) + 1)
    params = greedy(eos_token_id=free[early], ignore_eos=True, stop_token_ids=[free[late]])
    assert only(engine.rollout([PROMPT], params)).token_ids == free[: late + 1]


def test_an_end_on_the_last_allowed_token_is_a_stop(engine: Any, free: list[int]):
    at = first_at(free, 3)
    params = greedy(max_new_tokens=at + 1, eos_token_id=free[at])
    assert only(engine.rollout([PROMPT], params)).finish_reason == "stop"
    params = greedy(max_new_tokens=at, eos_token_id=free[at])
    cut = only(engine.rollout([PROMPT], params))
    assert (cut.finish_reason, cut.token_ids) == ("length", free[:at])


def test_no_end_comes_before_min_new_tokens(engine: Any, free: list[int]):
    params = greedy(eos_token_id=free[0], min_new_tokens=5)
    completion = only(engine.rollout([PROMPT], params))
    assert free[0] not in completion.token_ids[:5]
    assert len(completion.token_ids) >= 5
    unmasked = only(engine.rollout([PROMPT], greedy(eos_token_id=free[0])))
    assert unmasked.token_ids == free[:1]


def test_every_prompt_has_its_own_lengths_and_ends(engine: Any, free: list[int]):
    at = first_at(free, 3)
    params = [greedy(max_new_tokens=n, ignore_eos=True) for n in (1, 7, 12)]
    params.append(greedy(stop_token_ids=[free[at]], ignore_eos=True))
    out = engine.rollout([PROMPT] * 4, params)
    assert [c.token_ids for c in out.completions] == [free[:1], free[:7], free, free[: at + 1]]
    assert [c.finish_reason for c in out.completions] == ["length"] * 3 + ["stop"]


def test_a_stop_string_ends_the_tokens_and_is_cut_from_the_text(
    engine_of: Callable[..., Any], free: list[int]
):
    tokenizer = Letters()
    engine = engine_of(tokenizer)
    whole = tokenizer.decode(free, skip_special_tokens=True)
    # It begins inside one token and ends inside the next.
    stop = whole[7:9]
    assert whole.find(stop) == 7
    completion = only(engine.rollout([PROMPT], greedy(stop=stop, ignore_eos=True)))
    assert completion.text == whole[:7]
    assert completion.token_ids == free[:5]
    assert completion.finish_reason == "stop"


def test_the_earliest_of_several_stop_strings_cuts_the_text(
    engine_of: Callable[..., Any], free: list[int]
):
    engine = engine_of(Letters())
    whole = Letters().decode(free, skip_special_tokens=True)
    params = greedy(stop=(whole[6:8], whole[5:8], "nowhere"), ignore_eos=True)
    assert only(engine.rollout([PROMPT], params)).text == whole[:5]


def test_text_comes_with_a_tokenizer_alone(
    engine: Any, engine_of: Callable[..., Any], free: list[int]
):
    assert only(engine.rollout([PROMPT], greedy(ignore_eos=True))).text is None
    completion = only(engine_of(Letters()).rollout([PROMPT], greedy(ignore_eos=True)))
    assert completion.text == Letters().decode(free, skip_special_tokens=True)
    with pytest.raises(ConfigError, match="stop needs a tokenizer"):
        engine.rollout([PROMPT], greedy(stop="a"))


def test_logprobs_can_be_left_out(engine: Any, free: list[int]):
    completion = only(engine.rollout([PROMPT], greedy(logprobs=False, ignore_eos=True)))
    assert (completion.token_ids, completion.logprobs, completion.raw_logprobs) == (free, [], [])


class Marks:
    """A tokenizer stub: even tokens are special, and text only where they are kept."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"<{i}>" for i in ids if i % 2 or not skip_special_tokens)


def test_special_tokens_are_in_the_text_only_where_they_are_asked_for(
    engine_of: Callable[..., Any], free: list[int]
):
    engine = engine_of(Marks())
    special = next(i for i in free if i % 2 == 0)
    at = free.index(special)
    for skips in (True, False):
        whole = Marks().decode(free, skips)
        text = only(engine.rollout([PROMPT], greedy(ignore_eos=True, skip_special_tokens=skips)))
        assert text.text == whole
        params = greedy(ignore_eos=True, skip_special_tokens=skips, stop=f"<{special}>")
        completion = only(engine.rollout([PROMPT], params))
        if skips:
            assert (completion.text, completion.finish_reason) == (whole, "length")
        else:
            assert completion.token_ids == free[: at + 1]
            assert completion.text == Marks().decode(free[:at], False)
