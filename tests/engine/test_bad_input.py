"""What is refused, in which words, and that the engine goes on afterwards."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import VOCAB, hf_greedy, hybrid_engine, micro_step, plain_copy, tokens
from training_state import differences, snapshot

import tritonhybrid
from tritonhybrid import (
    CacheExhaustedError,
    ConfigError,
    EngineStateError,
    NonFiniteLogitsError,
    SamplingParams,
)

GREEDY = SamplingParams(max_new_tokens=5, temperature=0.0)
PROMPTS = [[5, 6, 7], [8, 9]]
IDS = torch.tensor([[5, 6, 7]])

# Rule: expected this, got that. What to do.
FOUR_PARTS = re.compile(r"^[^:].+: expected .+, got .+\. .+\.$", re.DOTALL)


class Trained:
    """An engine whose steps change nothing (lr 0, no dropout), so that results can be repeated."""

    def __init__(self, stage: int, **config: Any) -> None:
        self.engine = hybrid_engine(stage, config=config, lr=0.0, attention_dropout=0.0)
        self.loss = micro_step(self.engine, 0)
        self.tokens = hf_greedy(plain_copy(self.engine), PROMPTS, 5)

    def check_goes_on(self) -> None:
        """It trains and generates as if nothing had happened."""
        assert micro_step(self.engine, 0) == self.loss
        assert tokens(self.engine.rollout(PROMPTS, GREEDY)) == self.tokens
        assert self.engine.stats.path == "fused"

    def refuses(self, call: Callable[[Any], Any], error: type[Exception], words: str) -> None:
        """The call raises this error with these words and leaves no trace."""
        before = snapshot(self.engine)
        with pytest.raises(error, match=words) as caught:
            call(self.engine)
        assert differences(before, snapshot(self.engine)) == []
        if isinstance(caught.value, tritonhybrid.TritonHybridError):
            assert FOUR_PARTS.match(str(caught.value)), str(caught.value)
        self.check_goes_on()


@pytest.fixture(scope="module", params=[0, 3])
def trained(request: pytest.FixtureRequest) -> Trained:
    return Trained(request.param)


def rolls_out(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda engine: engine.rollout(*args, **kwargs)


def generates(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda engine: engine.generate(*args, **kwargs)


def params(**kwargs: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 4} | kwargs))


REFUSED_ROLLOUTS = {
    "empty prompt": (rolls_out([[5], []], GREEDY), "Prompt 1 is empty"),
    "token above the vocabulary": (
        rolls_out([[5, VOCAB]], GREEDY),
        rf"Prompt 0 .*outside the vocabulary: expected 0 to {VOCAB - 1}, got {VOCAB}",
    ),
    "negative token": (rolls_out([[5], [6, -1]], GREEDY), r"Prompt 1 .*got -1"),
    "a token that is no integer": (rolls_out([[5.0]], GREEDY), "got float"),
    "a bool for a token": (rolls_out([[True]], GREEDY), "got bool"),
    "text": (rolls_out("hello", GREEDY), "got text .* Tokenise"),
    "a list of texts": (rolls_out(["hello"], GREEDY), "got text .* Tokenise"),
    "a flat list": (rolls_out([5, 6], GREEDY), "got int in place of a list"),
    "no list at all": (rolls_out(5, GREEDY), "got int in place of a list"),
    "a prompt that is None": (rolls_out([None], GREEDY), "got NoneType"),
    "a flat tensor": (rolls_out(torch.tensor([5, 6]), GREEDY), r"got \(2,\) of torch.int64"),
    "a float tensor": (rolls_out(torch.ones(1, 2), GREEDY), "torch.float32"),
    "a bool tensor": (rolls_out(torch.ones(1, 2, dtype=torch.bool), GREEDY), "got bool"),
    "a mask of another shape": (
        rolls_out(IDS, GREEDY, attention_mask=torch.ones(1, 2)),
        r"expected \(1, 3\), got \(1, 2\)",
    ),
    "a mask beside lists": (
        rolls_out([[5]], GREEDY, attention_mask=torch.ones(1, 1)),
        "got list",
    ),
    "a row that is all padding": (
        rolls_out(IDS, GREEDY, attention_mask=torch.zeros(1, 3)),
        "Prompt 0 is empty",
    ),
    "too few sampling parameters": (rolls_out(PROMPTS, [GREEDY]), "got 1"),
    "a dict for sampling parameters": (
        rolls_out(PROMPTS, {"max_new_tokens": 3}),
        "SamplingParams",
    ),
    "uids of another count": (rolls_out(PROMPTS, GREEDY, uids=[1]), "got 1 values"),
    "uids that are no list": (rolls_out(PROMPTS, GREEDY, uids=5), "got int"),
    "a mask that is no tensor": (
        rolls_out(torch.tensor([[5, 6, 7]]), GREEDY, attention_mask=[[1, 1, 1]]),
        "attention_mask belongs to the prompts: .*got list",
    ),
    "a mask with a hole": (
        rolls_out(torch.tensor([[5, 6, 7]]), GREEDY, attention_mask=torch.tensor([[1, 0, 1]])),
        "pads the ends of a prompt, not its middle",
    ),
    "a uid twice": (rolls_out(PROMPTS, GREEDY, uids=[1, 1]), "stands twice"),
    "a uid that is no integer": (rolls_out(PROMPTS, GREEDY, uids=[1, 2.5]), "uids"),
    "a uid past 64 bits": (rolls_out(PROMPTS, GREEDY, uids=[0, 2**64]), "uids are 64-bit"),
    "longer than the model": (
        rolls_out([[5] * 100], params(max_new_tokens=29)),
        r"max_position_embeddings: expected at most 128 tokens, got 100 \+ 29 = 129",
    ),
    "stop strings without a tokenizer": (rolls_out(PROMPTS, params(stop="x")), "tokenizer"),
    "an end token outside the vocabulary": (
        rolls_out(PROMPTS, params(eos_token_id=VOCAB)),
        "end token lies outside the vocabulary",
    ),
}


@pytest.mark.parametrize("case", REFUSED_ROLLOUTS)
def test_rollout_refuses(trained, case):
    call, words = REFUSED_ROLLOUTS[case]
    trained.refuses(call, ConfigError, words)


def test_rollout_of_nothing_is_nothing(trained):
    assert trained.engine.rollout([], GREEDY).completions == []
    trained.check_goes_on()


def test_the_model_s_full_length_is_served(trained):
    out = trained.engine.rollout([[5] * 100], params(max_new_tokens=28, ignore_eos=True))
    assert len(out.completions[0].token_ids) == 28


REFUSED_GENERATES = {
    "unknown argument": (generates(IDS, max_new_tokens=3, no_such=1), ValueError, "no_such"),
    "token outside the vocabulary": (
        generates(torch.tensor([[VOCAB]]), max_new_tokens=3),
        ConfigError,
        "outside the vocabulary",
    ),
    "no new tokens": (generates(IDS, max_new_tokens=0), ValueError, "max_new_tokens"),
    "longer than the model": (
        generates(IDS, max_new_tokens=126),
        ConfigError,
        "max_position_embeddings",
    ),
    "several greedy sequences": (
        generates(IDS, max_new_tokens=3, do_sample=False, num_return_sequences=2),
        ValueError,
        "num_return_sequences",
    ),
    "top_p above 1": (
        generates(IDS, max_new_tokens=3, do_sample=True, top_p=1.5),
        ValueError,
        "top_p",
    ),
    "negative temperature": (
        generates(IDS, max_new_tokens=3, do_sample=True, temperature=-1.0),
        ValueError,
        "temperature",
    ),
    "a row that is all padding": (
        generates(IDS, attention_mask=torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=3),
        ConfigError,
        "is empty",
    ),
    "a mask of another shape": (
        generates(IDS, attention_mask=torch.tensor([[0, 1]]), max_new_tokens=3),
        ConfigError,
        r"expected \(1, 3\), got \(1, 2\)",
    ),
    # HF drops a mask of ones before we see it, and fails where it meets the positions.
    "a mask of ones of another shape": (
        generates(IDS, attention_mask=torch.ones(1, 2, dtype=torch.int64), max_new_tokens=3),
        RuntimeError,
        "size",
    ),
}


@pytest.mark.parametrize("case", REFUSED_GENERATES)
def test_generate_refuses(trained, case):
    call, error, words = REFUSED_GENERATES[case]
    trained.refuses(call, error, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"n": 0}, r"SamplingParams.n is out of range: expected a whole number >= 1, got 0"),
        ({"n": True}, "SamplingParams.n "),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
        ({"min_new_tokens": 5}, "min_new_tokens"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": 2.0}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"stop_token_ids": [2.5]}, "stop_token_ids"),
    ],
)
def test_sampling_params_refuse(settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        params(**settings)
    assert FOUR_PARTS.match(str(caught.value)), str(caught.value)


def test_sampling_params_refuse_an_unknown_name():
    with pytest.raises(TypeError, match="temprature"):
        params(temprature=1.0)


def test_a_sequence_that_cannot_fit_the_cache_is_refused():
    page = 2 * 2 * 16 * 4 * 4 * 3
    trained = Trained(0, block_size=4, kv_cache_bytes=4 * page)
    trained.refuses(
        rolls_out([[5, 6], [5] * 10], params(max_new_tokens=8)),
        CacheExhaustedError,
        r"expected at most 16 tokens, got prompt 10 \+ max_new_tokens 8 \(prompt 1\)",
    )
    trained.refuses(generates(IDS, max_new_tokens=16), CacheExhaustedError, "at most 16 tokens")


def test_a_cache_smaller_than_a_page_is_refused():
    engine = hybrid_engine(0, config={"kv_cache_bytes": 100})
    with pytest.raises(CacheExhaustedError, match="at least one page") as caught:
        engine.rollout(PROMPTS, GREEDY)
    assert FOUR_PARTS.match(str(caught.value))
    assert math.isfinite(micro_step(engine, 0))


def test_max_out_tokens_limits_only_when_the_config_names_it():
    limited = Trained(0, max_out_tokens=10)
    limited.refuses(
        rolls_out([[5] * 8], params(max_new_tokens=3)),
        ConfigError,
        r"max_out_tokens: expected at most 10 tokens, got 8 \+ 3 = 11",
    )
    limited.refuses(generates(IDS, max_new_tokens=8), ConfigError, "max_out_tokens")


def test_non_finite_logits_name_the_prompt_and_pass_with_the_weights():
    trained = Trained(0)
    weight = trained.engine.module.lm_head.weight
    trained.check_goes_on()
    kept = weight.detach().clone()
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            weight[7] = bad
        with pytest.raises(NonFiniteLogitsError, match="for prompt 0 at position 3") as caught:
            trained.engine.rollout(PROMPTS, GREEDY)
        assert (caught.value.prompt_index, caught.value.position) == (0, 3)
        with pytest.raises(NonFiniteLogitsError, match="at position 3"):
            trained.engine.generate(IDS, max_new_tokens=3, do_sample=True)
        with torch.no_grad():
            weight.copy_(kept)
        trained.check_goes_on()


def test_non_finite_weights_at_the_first_rollout_do_not_condemn_the_model():
    trained = Trained(0)
    weight = trained.engine.module.model.layers[1].mlp.up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(NonFiniteLogitsError):
        trained.engine.rollout(PROMPTS, GREEDY)
    with torch.no_grad():
        weight.copy_(kept)
    trained.check_goes_on()


def test_a_row_with_every_token_masked_is_an_error():
    trained = Trained(0)
    everything = params(min_new_tokens=1, eos_token_id=list(range(VOCAB)))
    trained.refuses(rolls_out(PROMPTS, everything), NonFiniteLogitsError, "prompt 0")


def test_calls_do_not_nest():
    trained = Trained(0)
    inner: list[BaseException] = []

    def call_again(*args: Any) -> None:
        try:
            trained.engine.rollout(PROMPTS, GREEDY)
        except EngineStateError as error:
            inner.append(error)

    handle = trained.engine.module.model.layers[0].register_forward_hook(call_again)
    assert tokens(trained.engine.rollout(PROMPTS, GREEDY)) == trained.tokens
    handle.remove()
    assert inner
    assert FOUR_PARTS.match(str(inner[0]))
    trained.check_goes_on()


def test_an_engine_is_wrapped_once():
    trained = Trained(0)
    trained.refuses(tritonhybrid.wrap, EngineStateError, "wrapped once")
