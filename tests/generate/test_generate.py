"""``generate`` with Hugging Face's contract: the same call to both gives the same answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from tritonhybrid import ConfigError
from tritonhybrid.containers.parts import cache_name

PROMPTS = [[5, 6, 7, 8, 9], [10] * 20, [11, 12], [13] * 17, [14]]


def padded(prompts: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def hf(engine: Any, *inputs: Any, **kwargs: Any) -> Any:
    """HF's own generate on the same weights, past the wrapped one."""
    return type(engine.module).generate(engine.module, *inputs, **kwargs)


def greedy_ends(model: Any, *, least: int = 3) -> list[int]:
    """Tokens that the greedy completions of PROMPTS meet at different places."""
    out = type(model).generate(
        model, **padded(PROMPTS), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    return sorted({row[least + index] for index, row in enumerate(out[:3, 20:].tolist())})


CALLS: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 12},
    "max_length": {"max_length": 33},
    "both lengths": {"max_new_tokens": 12, "max_length": 25},
    "one token": {"max_new_tokens": 1},
    "return sequences": {"max_new_tokens": 5, "num_return_sequences": 1},
    "repetition": {"max_new_tokens": 12, "repetition_penalty": 1.0},
    "no cache": {"max_new_tokens": 6, "use_cache": False},
    "static cache": {"max_new_tokens": 6, "cache_implementation": "static"},
    "other pad": {"max_new_tokens": 12, "pad_token_id": 77},
    "one beam": {"max_new_tokens": 12, "num_beams": 1},
    "synced": {"max_new_tokens": 12, "synced_gpus": True},
    "named as nothing": {"max_new_tokens": 12, "custom_generate": None, "streamer": None},
    "a config": {"generation_config": GenerationConfig(max_new_tokens=9, pad_token_id=3)},
    "filters that greedy ignores": {"max_new_tokens": 8, "num_return_sequences": 1},
    "min_new_tokens": {"max_new_tokens": 12, "min_new_tokens": 9},
    "min_length": {"max_new_tokens": 12, "min_length": 30},
    "min_new over max_new": {"max_new_tokens": 4, "min_new_tokens": 4},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ends", ["none", "one", "several"])
def test_greedy_output_equals_hugging_faces(engine: Any, name: str, ends: str):
    found = greedy_ends(engine.module)
    eos = {"none": None, "one": found[0], "several": found}[ends]
    kwargs = {"do_sample": False, "eos_token_id": eos, **CALLS[name]}
    if "generation_config" in kwargs:
        config = GenerationConfig(**kwargs["generation_config"].to_diff_dict())
        config.eos_token_id, config.do_sample = eos, False
        kwargs = {"generation_config": config}
    ours = engine.generate(**padded(PROMPTS), **kwargs)
    theirs = hf(engine, **padded(PROMPTS), **kwargs)
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert engine.stats.path == "fused" and engine.stats.notes == []


def test_rows_that_end_early_are_filled_and_the_output_is_as_long_as_the_longest(engine: Any):
    ends = greedy_ends(engine.module)
    ours = engine.generate(
        **padded(PROMPTS[:3]), max_new_tokens=12, do_sample=False, eos_token_id=ends
    )
    assert ours.shape[1] < 32
    assert 0 in ours[:, 20:].tolist()[0] + ours[:, 20:].tolist()[1] + ours[:, 20:].tolist()[2]
    assert engine.stats.completion_tokens == int((ours[:, 20:] != 0).sum())


@pytest.mark.parametrize("how", ["positional", "inputs", "input_ids", "config first"])
def test_ids_come_by_position_or_by_name(engine: Any, how: str):
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    config = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0)
    inputs, kwargs = {
        "positional": ((ids,), {"max_new_tokens": 7, "do_sample": False}),
        "inputs": ((), {"inputs": ids, "max_new_tokens": 7, "do_sample": False}),
        "input_ids": ((), {"input_ids": ids, "max_new_tokens": 7, "do_sample": False}),
        "config first": ((ids, config), {}),
    }[how]
    ours = engine.generate(*inputs, **kwargs)
    assert torch.equal(ours, hf(engine, *inputs, **kwargs))
    assert torch.equal(ours, engine.module.generate(*inputs, **kwargs))
    assert engine.stats.path == "fused"


def test_without_a_mask_padding_is_found_as_hugging_face_finds_it(engine: Any):
    ids = padded(PROMPTS)["input_ids"]
    ours = engine.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(ours, hf(engine, ids, max_new_tokens=9, do_sample=False))
    masked = engine.generate(**padded(PROMPTS), max_new_tokens=9, do_sample=False)
    assert torch.equal(ours, masked)


def test_greedy_return_sequences_are_refused_as_hugging_face_refuses_them(engine: Any):
    kwargs = {"max_new_tokens": 4, "do_sample": False, "num_return_sequences": 2}
    with pytest.raises(ValueError, match="num_return_sequences") as theirs:
        hf(engine, **padded(PROMPTS), **kwargs)
    with pytest.raises(ValueError, match="num_return_sequences") as ours:
        engine.generate(**padded(PROMPTS), **kwargs)
    assert str(ours.value) == str(theirs.value)


def ignores_padding(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether HF's repetition penalty leaves padding out: transformers 5.24 does, 5.10 doesn't."""
    config = GenerationConfig(repetition_penalty=1.7)
    config._eos_token_tensor = None
    mask = {"attention_mask": inputs["attention_mask"]}
    (penalty,) = model._get_logits_processor(
        config, inputs["input_ids"].shape[1], model_kwargs=mask
    )
    return isinstance(penalty.prompt_ignore_length, torch.Tensor)


def test_repetition_penalty_is_native_unless_padding_counts_as_seen(engine: Any):
    kwargs = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.7}
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    ours = engine.generate(ids, **kwargs)
    assert engine.stats.path == "fused"
    assert torch.equal(ours, hf(engine, ids, **kwargs))
    inputs = padded(PROMPTS)
    ours = engine.generate(**inputs, **kwargs)
    if ignores_padding(engine.module, inputs):
        assert engine.stats.path == "fused"
    else:
        assert engine.stats.path == "hf" and "repetition penalty" in engine.stats.notes[0]
    assert torch.equal(ours, hf(engine, **inputs, **kwargs))


def forbidding(model: Any) -> dict[str, dict[str, Any]]:
    """Settings that each change the greedy tokens of PROMPTS."""
    out = type(model).generate(
        model, **padded(PROMPTS), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    new = out[:, 20:].tolist()
    second, third, fourth = (sorted({row[place] for row in new}) for place in (1, 2, 3))
    pairs = [row[2:4] for row in new]
    return {
        "bad words": {"bad_words_ids": [[token] for token in third]},
        "bad words of several tokens": {"bad_words_ids": [*pairs, [10, 10], [10, new[1][0]]]},
        "a bad word that is EOS": {
            "bad_words_ids": [[token] for token in (*second, third[0])],
            "eos_token_id": third[0],
        },
        "suppressed": {"suppress_tokens": third},
        "suppressed at the beginning": {"begin_suppress_tokens": [row[0] for row in new]},
        "forced EOS": {"forced_eos_token_id": 55},
        "forced EOS of several": {"forced_eos_token_id": [56, 55], "eos_token_id": 55},
        "biases": {"sequence_bias": {(third[0],): -4.5, (fourth[0],): float("-inf"), (7,): 3.0}},
        "biases in a list": {"sequence_bias": [[[third[0]], -2.5], [[8], 2.0]]},
        "all together": {
            "bad_words_ids": pairs,
            "suppress_tokens": third[:1],
            "begin_suppress_tokens": [new[0][0]],
            "forced_eos_token_id": 55,
            "sequence_bias": {(fourth[0],): -2.0},
            "min_new_tokens": 5,
            "eos_token_id": third[-1],
        },
    }


FORBIDDING = (
    "bad words",
    "bad words of several tokens",
    "a bad word that is EOS",
    "suppressed",
    "suppressed at the beginning",
    "forced EOS",
    "forced EOS of several",
    "biases",
    "biases in a list",
    "all together",
)


@pytest.mark.parametrize("name", FORBIDDING)
def test_forbidden_forced_and_biased_tokens_are_native_and_hugging_faces(engine: Any, name: str):
    settings = forbidding(engine.module)[name]
    base = {"max_new_tokens": 12, "do_sample": False}
    inputs = padded([prompt for prompt in PROMPTS if len(prompt) > 1])
    ours = engine.generate(**inputs, **base, **settings)
    assert engine.stats.path == "fused" and engine.stats.notes == []
    theirs = hf(engine, **inputs, **base, **settings)
    assert torch.equal(ours, theirs)
    plain = {key: value for key, value in settings.items() if key == "eos_token_id"}
    assert not torch.equal(ours, hf(engine, **inputs, **base, **plain))


@pytest.mark.parametrize("prompts", [[[14], [9]], PROMPTS], ids=["one token", "longer"])
def test_a_forced_bos_follows_prompts_of_one_token_alone(engine: Any, prompts: list[list[int]]):
    kwargs = {
        "max_new_tokens": 6,
        "do_sample": False,
        "forced_bos_token_id": 33,
        "begin_suppress_tokens": list(range(50)),
    }
    ours = engine.generate(**padded(prompts), **kwargs)
    assert engine.stats.path == "fused"
    assert torch.equal(ours, hf(engine, **padded(prompts), **kwargs))
    width = max(map(len, prompts))
    assert bool((ours[:, width] == 33).all()) == (width == 1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sequence_bias": {(5, 6): -2.0}}, "sequence_bias of several tokens"),
        ({"suppress_tokens": [5, 101]}, "suppress_tokens outside the vocabulary"),
        ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens outside the vocabulary"),
        ({"bad_words_ids": [[0, 0, 14, 9]]}, "bad_words_ids that reach into padding"),
    ],
)
def test_token_settings_that_mean_something_else_there_are_hugging_faces(
    engine: Any, settings: dict[str, Any], reason: str
):
    kwargs = {"max_new_tokens": 6, "do_sample": False, **settings}
    ours = engine.generate(**padded(PROMPTS), **kwargs)
    assert engine.stats.path == "hf" and reason in engine.stats.notes[0]
    assert torch.equal(ours, hf(engine, **padded(PROMPTS), **kwargs))


def test_a_model_output_holds_the_same_sequences(engine: Any):
    kwargs = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True}
    ours = engine.generate(**padded(PROMPTS), **kwargs)
    theirs = hf(engine, **padded(PROMPTS), **kwargs)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_the_models_generation_config_is_honoured(engine: Any, monkeypatch: pytest.MonkeyPatch):
    config = engine.module.generation_config
    monkeypatch.setattr(config, "max_new_tokens", 6)
    monkeypatch.setattr(config, "eos_token_id", greedy_ends(engine.module))
    ours = engine.generate(**padded(PROMPTS))
    assert torch.equal(ours, hf(engine, **padded(PROMPTS)))
    assert ours.shape[1] <= 26


def test_sampling_repeats_under_manual_seed_and_differs_from_call_to_call(engine: Any):
    kwargs = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    first, second = (engine.generate(**padded(PROMPTS), **kwargs) for _ in range(2))
    torch.manual_seed(5)
    again = engine.generate(**padded(PROMPTS), **kwargs)
    assert torch.equal(first, again)
    assert first.shape[0] == second.shape[0] == 15
    assert not torch.equal(first[:, :25], second[:, :25])
    assert len({tuple(row) for row in first[:3].tolist()}) == 3
    assert engine.stats.sampler == "inverse_cdf"


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.3, "top_k": 0}, {"min_p": 0.4, "top_k": 0}],
    ids=lambda settings: next(iter(settings)),
)
def test_first_sampled_tokens_follow_hugging_faces_distribution(engine: Any, settings: dict):
    """Chi-square of 4,000 draws against the scores that HF's own sampling reports."""
    ids = torch.tensor([PROMPTS[0]])
    kwargs = {"do_sample": True, "max_new_tokens": 1, **settings}
    scores = hf(engine, ids, return_dict_in_generate=True, output_scores=True, **kwargs).scores[0]
    expected = scores[0].double().softmax(-1)
    torch.manual_seed(1)
    drawn = engine.generate(ids, num_return_sequences=4000, **kwargs)[:, -1]
    assert engine.stats.path == "fused"
    counts = drawn.bincount(minlength=101).double()
    assert counts[expected == 0].sum() == 0
    usual = expected * 4000 >= 5
    statistic = ((counts - 4000 * expected)[usual] ** 2 / (4000 * expected[usual])).sum()
    freedom = int(usual.sum())
    assert statistic < freedom + 5.2 * (2 * freedom) ** 0.5 + 18


class Favour(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 42] += 5
        return scores


class AfterFour(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 24)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.values.append([])


class Words:
    """As much of a tokenizer as HF's stop strings need: token i is one letter."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def get_vocab(self) -> dict[str, int]:
        return {chr(0x4E00 + i): i for i in range(101)}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def own_decodings(model: Any) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    """Per case: a word of the announced reason, and fresh arguments for one call."""
    processors = [Favour()]
    return {
        "beams": ("num_beams", lambda: {"num_beams": 3}),
        "beams in a config": (
            "beam",
            lambda: {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=8)},
        ),
        "several of the beams": (
            "num_beams",
            lambda: {"num_beams": 3, "num_return_sequences": 2},
        ),
        "processor": (
            "logits_processor",
            lambda: {"logits_processor": LogitsProcessorList(processors)},
        ),
        "processor of a served class": (
            "logits_processor",
            lambda: {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.1)])},
        ),
        "processor in the config": ("NoRepeatNGram", lambda: {"no_repeat_ngram_size": 1}),
        "criterion": (
            "stopping_criteria",
            lambda: {"stopping_criteria": StoppingCriteriaList([AfterFour()])},
        ),
        "stop strings": (
            "tokenizer",
            lambda: {"stop_strings": [chr(0x4E00 + 33)], "tokenizer": Words()},
        ),
        "scores": (
            "output_scores",
            lambda: {"output_scores": True, "return_dict_in_generate": True},
        ),
        "hidden states": (
            "output_hidden_states",
            lambda: {"output_hidden_states": True, "return_dict_in_generate": True},
        ),
        "early exit": ("assisted", lambda: {"assistant_early_exit": 1}),
        "assisted": ("assistant_model", lambda: {"assistant_model": model}),
        "prompt lookup": ("assisted", lambda: {"prompt_lookup_num_tokens": 2}),
        "allowed tokens": (
            "PrefixConstrained",
            lambda: {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7]},
        ),
    }


@pytest.mark.parametrize("name", own_decodings(None))
def test_what_our_loop_does_not_serve_is_hugging_faces_result_announced(engine: Any, name: str):
    reason, arguments = own_decodings(engine.module)[name]
    # Assistants take one sequence at a time.
    inputs = padded(PROMPTS[1:2] if "assist" in reason else PROMPTS)
    base = {"max_new_tokens": 8, "do_sample": False}
    if "generation_config" in arguments():
        base = {}
    ours = engine.generate(**inputs, **base, **arguments())
    assert engine.stats.path == "hf"
    assert reason in engine.stats.notes[0]
    theirs = hf(engine, **inputs, **base, **arguments())
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
        return
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.scores or (), theirs.scores or (), strict=True):
        assert torch.equal(mine, other)
    assert (ours.scores is None) == (theirs.scores is None)


def stream(generate: Callable[..., Any], ids: torch.Tensor, **kwargs: Any) -> Any:
    """The answer, and what the streamer was given."""
    streamer = Collector()
    return generate(ids, max_new_tokens=6, do_sample=False, streamer=streamer, **kwargs), (
        streamer.values
    )


def test_a_streamer_of_one_row_gets_every_token_from_our_loop(engine: Any):
    ids = torch.tensor([PROMPTS[0]])
    ours, streamed = stream(engine.generate, ids)
    assert engine.stats.path == "fused" and engine.stats.notes == []
    theirs, expected = stream(partial(hf, engine), ids)
    assert torch.equal(ours, theirs)
    assert streamed == expected == [PROMPTS[0], *([t] for t in ours[0, 5:].tolist()), []]


def test_a_streamer_hears_of_the_token_that_ends_its_row(engine: Any):
    ids = torch.tensor([PROMPTS[0]])
    end = greedy_ends(engine.module, least=0)
    ours, streamed = stream(engine.generate, ids, eos_token_id=end)
    theirs, expected = stream(partial(hf, engine), ids, eos_token_id=end)
    assert torch.equal(ours, theirs) and ours.shape[1] < 11
    assert streamed == expected and streamed[-2][0] in end


def test_a_streamer_given_by_position_is_served_too(engine: Any):
    ids, config = torch.tensor([PROMPTS[0]]), GenerationConfig(max_new_tokens=6, do_sample=False)
    streams = Collector(), Collector()
    ours = engine.generate(ids, config, None, None, None, True, None, streams[0])
    assert engine.stats.path == "fused"
    assert torch.equal(ours, hf(engine, ids, config, None, None, None, None, None, streams[1]))
    assert streams[0].values == streams[1].values
    with pytest.raises(TypeError, match="streamer"):
        engine.generate(ids, config, None, None, None, True, None, streams[0], streamer=streams[1])


def test_a_model_on_hugging_faces_loop_streams_its_prompt_once(wrapped: Callable[..., Any]):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        rope_parameters=rope,
        pad_token_id=0,
    )
    engine = wrapped(LlamaForCausalLM(config).eval())
    ids = torch.tensor([list(range(3, 25))])
    ours, streamed = stream(engine.generate, ids)
    assert engine.stats.path == "hf"
    theirs, expected = stream(partial(hf, engine), ids)
    assert torch.equal(ours, theirs) and streamed == expected and len(streamed) == 8


@pytest.mark.parametrize(
    "settings",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}, {"num_beam_groups": 2}],
    ids=lambda settings: next(iter(settings)),
)
def test_decodings_that_hugging_face_has_moved_out_are_answered_as_it_answers(
    engine: Any, settings: dict
):
    ids = torch.tensor([PROMPTS[0]])
    kwargs = {"max_new_tokens": 4, "do_sample": False, **settings}
    if "num_beam_groups" in settings:
        kwargs |= {"num_beams": 4, "diversity_penalty": 0.5}
    with pytest.raises(ValueError, match="trust_remote_code") as theirs:
        hf(engine, ids, **kwargs)
    with pytest.raises(ValueError, match="trust_remote_code") as ours:
        engine.generate(ids, **kwargs)
    assert str(ours.value) == str(theirs.value)


def test_embeddings_as_input_are_served_by_hugging_face(engine: Any):
    embeddings = engine.module.get_input_embeddings()(torch.tensor([PROMPTS[0]])).detach()
    ours = engine.generate(inputs_embeds=embeddings, max_new_tokens=6, do_sample=False)
    theirs = hf(engine, inputs_embeds=embeddings, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, theirs) and ours.shape == (1, 6)
    assert "inputs_embeds" in engine.stats.notes[0]


def test_what_hugging_face_decodes_is_counted(engine: Any):
    ids = torch.tensor([[0, 0, *PROMPTS[0]], list(range(3, 5 + len(PROMPTS[0])))])
    mask = ids.ne(0).long()
    out = engine.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=8, do_sample=False)
    stats = engine.stats
    assert stats.path == "hf" and stats.decode_s > 0
    assert stats.prompt_tokens == int(mask.sum())
    new = out[:, ids.shape[1] :].tolist()
    ended = [row.index(2) + 1 if 2 in row else len(row) for row in new]
    assert stats.completion_tokens == sum(ended)
    assert stats.tokens_per_s > 0


def test_a_callers_cache_is_read_and_filled_as_served_by_hugging_face(engine: Any):
    ids = torch.tensor([PROMPTS[1]])
    name = cache_name(engine.module)

    def empty() -> dict[str, DynamicCache]:
        return {name: DynamicCache(config=engine.module.config)}

    def filled() -> dict[str, DynamicCache]:
        cache = empty()
        with torch.no_grad():
            engine.module(input_ids=ids[:, :-3], use_cache=True, **cache)
        return cache

    kwargs = {"max_new_tokens": 6, "do_sample": False}
    ours = engine.generate(ids, **filled(), **kwargs)
    assert engine.stats.notes[0].endswith(name)
    assert torch.equal(ours, hf(engine, ids, **filled(), **kwargs))
    given = empty()
    engine.generate(ids, **given, **kwargs)
    assert given[name].get_seq_length() == ids.shape[1] + 5


def test_positions_of_ones_own_are_served_by_hugging_face(engine: Any):
    ids = torch.tensor([PROMPTS[0]])
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    shifted = torch.arange(3, 8).unsqueeze(0)
    ours = engine.generate(ids, position_ids=shifted, **kwargs)
    assert "position_ids" in engine.stats.notes[0]
    assert torch.equal(ours, hf(engine, ids, position_ids=shifted, **kwargs))
    engine.generate(ids, position_ids=torch.arange(5).unsqueeze(0), **kwargs)
    assert engine.stats.path == "fused"


def test_a_mask_with_holes_is_served_by_hugging_face(engine: Any):
    ids = torch.tensor([PROMPTS[1], PROMPTS[1]])
    mask = torch.ones_like(ids)
    mask[1, 4:7] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    ours = engine.generate(ids, **kwargs)
    assert "not left-padded" in engine.stats.notes[0]
    assert torch.equal(ours, hf(engine, ids, **kwargs))


def test_an_unknown_argument_is_refused_by_name(engine: Any):
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match="max_new_token'") as ours:
        engine.generate(ids, max_new_token=5)
    with pytest.raises(ValueError, match="max_new_token'") as theirs:
        hf(engine, ids, max_new_token=5)
    assert str(ours.value) == str(theirs.value)
    assert engine.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 10)


def test_lengths_past_the_models_limit_are_refused(engine: Any):
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ConfigError, match=r"max_position_embeddings.*at most 128 tokens"):
        engine.generate(ids, max_new_tokens=124, do_sample=False)
    with pytest.raises(ValueError, match="max_length"):
        engine.generate(ids, max_length=5, do_sample=False)


def test_hugging_faces_decoding_is_logged_once_and_noted_each_time(
    engine: Any, caplog: pytest.LogCaptureFixture
):
    ids = torch.tensor([PROMPTS[0]])
    with caplog.at_level("WARNING", logger="tritonhybrid"):
        for _ in range(2):
            engine.generate(ids, max_new_tokens=2, num_beams=2, do_sample=False)
            assert len(engine.stats.notes) == 1
    assert [record.message for record in caplog.records] == [
        "tritonhybrid: HF's own decoding serves this call: num_beams"
    ]
