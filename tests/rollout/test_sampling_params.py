"""Sampling settings that are refused: by themselves, and against the model's vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tritonhybrid import ConfigError, SamplingParams

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1e-40}, r"temperature is out of range: .*\[1e-6, 1e6\], got 1e-40"),
        ({"temperature": 10**400}, r"temperature is out of range: .*\[1e-6, 1e6\]"),
        ({"temperature": True}, r"temperature is out of range: .*got True"),
        ({"repetition_penalty": 1e-300}, r"repetition_penalty is out of range: .*\[1e-6, 1e6\]"),
        ({"stop": 5}, "stop takes strings that are not empty: .*got 5"),
        ({"stop": None}, "stop takes strings that are not empty: .*got None"),
        ({"ignore_eos": "no"}, "ignore_eos is a switch: expected True or False, got 'no'"),
        ({"logprobs": 5}, "logprobs is a switch: expected True or False, got 5"),
        ({"presence_penalty": 2.5}, r"presence_penalty is out of range: .*\[-2, 2\], got 2.5"),
        ({"frequency_penalty": NAN}, r"frequency_penalty is out of range: .*\[-2, 2\], got nan"),
        ({"logit_bias": [(3, 1.0)]}, r"logit_bias maps .*: expected a dict, got \[\(3, 1.0\)\]"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias holds token ids: expected whole numbers"),
        ({"logit_bias": {3: INF}}, "logit_bias is out of range: .*-inf, got inf for token 3"),
        ({"logit_bias": {3: NAN}}, "logit_bias is out of range: .*got nan for token 3"),
        ({"logit_bias": {3: "1"}}, "logit_bias is out of range: .*got '1' for token 3"),
        ({"bad_words_ids": [7]}, r"bad_words_ids holds words, .*got \[7\]"),
        ({"bad_words_ids": 7}, r"bad_words_ids holds words, .*got 7"),
        (
            {"bad_words_ids": [[7], []]},
            r"bad_words_ids holds words, .*not empty, got \[\[7\], \[\]",
        ),
        ({"bad_words_ids": ["ab"]}, r"bad_words_ids holds words, .*got \['ab'\]"),
        ({"bad_words_ids": [[7, 1.5]]}, r"bad_words_ids holds token ids: .*got \[7, 1.5\]"),
        ({"suppress_tokens": 7}, "suppress_tokens holds token ids: .*got 7"),
        ({"suppress_tokens": [True]}, r"suppress_tokens holds token ids: .*got \[True\]"),
        ({"begin_suppress_tokens": "ab"}, "begin_suppress_tokens holds token ids: .*got 'ab'"),
        ({"forced_bos_token_id": 1.0}, r"forced_bos_token_id holds token ids: .*got \(1.0,\)"),
        ({"forced_eos_token_id": ["a"]}, r"forced_eos_token_id holds token ids: .*got \['a'\]"),
        (
            {"forced_eos_token_id": [4, 5], "suppress_tokens": [3, 4, 5]},
            r"forced_eos_token_id can't be suppressed .*got \[4, 5\]",
        ),
        (
            {"forced_bos_token_id": 3, "suppress_tokens": [3]},
            r"forced_bos_token_id can't be suppressed .*got \[3\]",
        ),
        ({"top_logprobs": -1}, "top_logprobs is out of range: .*>= 0, got -1"),
        ({"top_logprobs": True}, "top_logprobs is out of range: .*got True"),
        ({"entropy": 1}, "entropy is a switch: expected True or False, got 1"),
        ({"skip_special_tokens": None}, "skip_special_tokens is a switch: .*got None"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_expected_and_found(
    settings: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {101: 1.0}}, r"logit_bias .*expected 0 to 100, got \[101\]"),
        ({"bad_words_ids": [[5, 200], [6]]}, r"bad_words_ids .*got \[200\]"),
        ({"suppress_tokens": [5, -1]}, r"suppress_tokens .*got \[-1\]"),
        ({"begin_suppress_tokens": [101]}, r"begin_suppress_tokens .*got \[101\]"),
        ({"forced_bos_token_id": 101}, r"forced_bos_token_id .*got \[101\]"),
        ({"forced_eos_token_id": -2}, r"forced_eos_token_id .*got \[-2\]"),
        (
            {"top_logprobs": 102},
            "top_logprobs can't exceed the vocabulary: expected <= 101, got 102",
        ),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused_before_anything_runs(
    engine: Any, settings: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        engine.rollout([[5, 6]], SamplingParams(**settings))
    assert engine.stats.num_prefill_steps == 0


def test_plain_settings_can_be_hashed_and_need_no_logits():
    assert hash(SamplingParams()) == hash(SamplingParams())
    assert not SamplingParams(top_logprobs=3, entropy=True, temperature=0.7).has_filters
    assert not SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1).has_filters


@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"bad_words_ids": [[1]]},
        {"suppress_tokens": [1]},
        {"begin_suppress_tokens": [1]},
        {"forced_bos_token_id": 0},
        {"forced_eos_token_id": 0},
        {"min_new_tokens": 1},
        {"top_k": 1},
        {"top_p": 0.9},
        {"min_p": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_that_changes_logits_is_known_to_need_them(settings: dict[str, Any]):
    assert SamplingParams(**settings).has_filters
