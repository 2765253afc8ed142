"""The sampler alone: Hugging Face's processed distribution, drawn from faithfully."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tritonhybrid.errors import NonFiniteLogitsError
from tritonhybrid.noise import sequence_key
from tritonhybrid.sampler import HeadCalls, Sampler, process_logits
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.sequence import Sequence
from tritonhybrid_kernels.ops import select_ops

VOCAB = 50
PROMPT = (3, 7, 7, 11)
OUTPUT = (20, 3)
ENDS = (2, 5)


def sequence(params: SamplingParams, *, uid: int = 0, seed: int = 0, index: int = 0) -> Sequence:
    return Sequence(
        prompt_index=index,
        sample_index=0,
        uid=uid,
        key=sequence_key(seed, 0),
        prompt=PROMPT,
        prompt_key=index,
        params=params,
        end_ids=frozenset(ENDS),
        output=list(OUTPUT),
    )


def hf_processed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What HF's sampling draws from, its processors in the order of its generate."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_new_tokens:
        processors.append(
            MinNewTokensLengthLogitsProcessor(len(PROMPT), params.min_new_tokens, list(ENDS))
        )
    if not params.is_greedy:
        processors.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            processors.append(MinPLogitsWarper(params.min_p))
    ids = torch.tensor([[*PROMPT, *OUTPUT]])
    return processors(ids, logits.clone().unsqueeze(0)).squeeze(0)


def random_logits(kind: str, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(VOCAB, generator=generator)
    return {
        "normal": 3 * normal,
        "flat": 1e-3 * normal,
        "ties": (2 * normal).round(),
        "uniform": torch.zeros(VOCAB),
        "peaked": 100 * normal,
        "huge": 1e30 * normal,
        "masked": normal.masked_fill(normal < 0, -math.inf),
    }[kind]


def random_params(generator: torch.Generator) -> SamplingParams:
    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    return SamplingParams(
        max_new_tokens=8,
        temperature=pick(0.0, 0.3, 1.0, 1.0, 1.7),
        top_k=pick(0, 0, 1, 5, 49, 50, 1000),
        top_p=pick(1.0, 1.0, 0.9, 0.8, 0.5, 0.1, 1e-6),
        min_p=pick(0.0, 0.0, 0.05, 0.5, 1.0),
        repetition_penalty=pick(1.0, 1.0, 1.3, 0.7),
        min_new_tokens=pick(0, 0, 2, 5),
    )


def sampler_of(logits: torch.Tensor) -> Sampler:
    head = HeadCalls(logits=lambda hidden: logits[hidden.long().flatten()], weight=None, bias=None)
    return Sampler(select_ops("torch"), head, torch.device("cpu"))


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> Any:
    hidden = torch.arange(len(sequences)).unsqueeze(1)
    return sampler_of(logits).sample(hidden, sequences)


@pytest.mark.parametrize("kind", ["normal", "flat", "ties", "uniform", "peaked", "huge", "masked"])
def test_processed_logits_equal_hugging_faces_in_every_element(kind: str):
    generator = torch.Generator().manual_seed(0)
    cases = [(random_logits(kind, generator), random_params(generator)) for _ in range(64)]
    logits = torch.stack([row for row, _ in cases])
    before = logits.clone()
    ours = process_logits(logits, [sequence(params) for _, params in cases])
    assert torch.equal(logits, before)
    for index, (row, params) in enumerate(cases):
        assert torch.equal(ours[index], hf_processed(row, params)), params


def test_a_row_is_processed_the_same_alone_and_among_others():
    generator = torch.Generator().manual_seed(1)
    cases = [(random_logits("ties", generator), random_params(generator)) for _ in range(16)]
    together = process_logits(
        torch.stack([row for row, _ in cases]), [sequence(params) for _, params in cases]
    )
    for index, (row, params) in enumerate(cases):
        alone = process_logits(row.unsqueeze(0), [sequence(params)])
        assert torch.equal(together[index], alone[0])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_k=7),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.3, min_p=0.1, repetition_penalty=1.4),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p_penalty"],
)
def test_drawn_tokens_follow_hugging_faces_distribution(params: SamplingParams):
    """Chi-square of 20,000 draws; its bound is passed by chance once in ten million runs."""
    logits = 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    expected = hf_processed(logits, params).double().softmax(-1)
    draws = 20_000
    sequences = [sequence(params, uid=uid) for uid in range(draws)]
    tokens = torch.tensor(sample(logits.expand(draws, VOCAB), sequences).tokens)
    counts = tokens.bincount(minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0
    usual = expected * draws >= 5
    rare = draws - counts[usual].sum(), draws * (1 - expected[usual].sum())
    statistic = ((counts[usual] - draws * expected[usual]) ** 2 / (draws * expected[usual])).sum()
    if rare[1] > 5:
        statistic += (rare[0] - rare[1]) ** 2 / rare[1]
    freedom = int(usual.sum())
    assert statistic < freedom + 5.2 * math.sqrt(2 * freedom) + 18


def test_logprobs_are_of_the_processed_and_raw_ones_of_the_plain_distribution():
    generator = torch.Generator().manual_seed(3)
    cases = [(random_logits("normal", generator), random_params(generator)) for _ in range(64)]
    sequences = [sequence(params, uid=uid) for uid, (_, params) in enumerate(cases)]
    sampled = sample(torch.stack([row for row, _ in cases]), sequences)
    for index, (row, params) in enumerate(cases):
        raw = row.double().log_softmax(-1)[sampled.tokens[index]]
        exact = hf_processed(row, params).double().log_softmax(-1)[sampled.tokens[index]]
        assert sampled.raw_logprobs[index] == pytest.approx(float(raw), abs=2e-5)
        expected = raw if params.is_greedy else exact
        assert sampled.logprobs[index] == pytest.approx(float(expected), abs=2e-5)


def test_greedy_takes_the_lowest_of_equal_tokens_and_ignores_filters():
    logits = torch.full((2, 300), -1.0)
    logits[0, [257, 40, 41]] = 2.0
    logits[1, [299, 130]] = 2.0
    greedy = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=1.0)
    assert sample(logits, [sequence(greedy), sequence(greedy)]).tokens == [40, 130]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_reported_with_prompt_and_position(
    value: float, temperature: float
):
    logits = torch.zeros(3, VOCAB)
    logits[1, 17] = value
    rows = [sequence(SamplingParams(temperature=temperature), index=i) for i in (4, 5, 6)]
    with pytest.raises(NonFiniteLogitsError, match="prompt 5 at position 6") as caught:
        sample(logits, rows)
    assert (caught.value.prompt_index, caught.value.position) == (5, 6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_every_token_masked_is_reported(temperature: float):
    logits = torch.zeros(2, VOCAB)
    logits[0] = -math.inf
    rows = [sequence(SamplingParams(temperature=temperature), index=i) for i in (0, 1)]
    with pytest.raises(NonFiniteLogitsError, match="prompt 0"):
        sample(logits, rows)


def test_noise_depends_on_seed_uid_and_position_alone():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    params = SamplingParams()

    def draw(count: int = 1, **own: int) -> list[int]:
        rows = [sequence(params, **own) for _ in range(count)]
        return sample(logits.expand(count, VOCAB), rows).tokens

    def draws(name: str) -> list[int]:
        return [draw(**{name: value})[0] for value in range(40)]

    assert draw(count=5) == draw() * 5
    assert len(set(draws("uid"))) > 5 and len(set(draws("seed"))) > 5
    assert draws("uid") != draws("seed")
    later = sequence(params)
    longer = []
    for _ in range(40):
        longer += sample(logits, [later]).tokens
        later.output.append(1)
    assert len(set(longer)) > 5
