"""The sampler alone: Hugging Face's processed distribution, drawn from faithfully."""

from __future__ import annotations

import math
from dataclasses import replace
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
from tritonhybrid.logit_rules import LogitRules
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


REPORTED = (
    {"top_logprobs": 3, "entropy": True},
    {"top_logprobs": 5, "temperature": 0.0},
    {"entropy": True, "top_k": 2, "suppress_tokens": [1]},
    {"top_logprobs": VOCAB, "temperature": 0.7},
    {},
)


def test_top_logprobs_and_entropy_are_of_the_raw_distribution():
    logits = 3 * torch.randn(len(REPORTED), VOCAB, generator=torch.Generator().manual_seed(6))
    logits[0, :20] = -math.inf
    params = [SamplingParams(**settings) for settings in REPORTED]
    sampled = sample(logits, [sequence(p, uid=i) for i, p in enumerate(params)])
    exact = logits.double().log_softmax(-1)
    assert list(sampled.top_logprobs) == [0, 1, 3] and list(sampled.entropies) == [0, 2]
    for row, pairs in sampled.top_logprobs.items():
        best = exact[row].sort(descending=True)
        assert [token for token, _ in pairs] == best.indices[: len(pairs)].tolist()
        assert len(pairs) == params[row].top_logprobs
        expected = best.values[: len(pairs)].tolist()
        assert [value for _, value in pairs] == pytest.approx(expected, abs=2e-5)
    for row, entropy in sampled.entropies.items():
        kept = exact[row][exact[row].isfinite()]
        assert entropy == pytest.approx(float(-(kept.exp() * kept).sum()), abs=2e-5)


def test_asking_for_top_logprobs_or_entropy_changes_no_token():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(7)).expand(200, VOCAB)
    plain = [sequence(SamplingParams(top_p=0.9), uid=i) for i in range(200)]
    asking = [
        sequence(SamplingParams(top_p=0.9, top_logprobs=2, entropy=True), uid=i) for i in range(200)
    ]
    assert sample(logits, asking).tokens == sample(logits, plain).tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": range(VOCAB)},
        {"bad_words_ids": [[3, token] for token in range(VOCAB)]},
        {"logit_bias": dict.fromkeys(range(VOCAB), -math.inf)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_row_whose_settings_forbid_every_token_is_reported(settings: dict, temperature: float):
    rows = [sequence(SamplingParams(temperature=temperature), index=0)]
    rows.append(sequence(SamplingParams(temperature=temperature, **settings), index=1))
    with pytest.raises(NonFiniteLogitsError, match="prompt 1 at position 6"):
        sample(torch.zeros(2, VOCAB), rows)


def test_rows_without_rules_are_neither_copied_nor_processed_beside_rows_with_them(
    monkeypatch: pytest.MonkeyPatch,
):
    shapes = []
    apply = LogitRules.apply

    def watched(rules: LogitRules, logits: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return apply(rules, logits)

    monkeypatch.setattr(LogitRules, "apply", watched)
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(4, VOCAB, generator=generator)
    params = [SamplingParams(), SamplingParams(top_k=3), SamplingParams(temperature=0.0)]
    params.append(SamplingParams(temperature=0.0, repetition_penalty=1.5))
    rows = [sequence(p, uid=i) for i, p in enumerate(params)]
    together = sample(logits, rows)
    assert shapes == [(2, VOCAB)]
    for index, row in enumerate(rows):
        alone = sample(logits[index : index + 1], [row])
        assert together.row(index) == pytest.approx(alone.row(0), abs=1e-6)
    sample(logits, [sequence(SamplingParams(), uid=i) for i in range(4)])
    assert shapes == [(2, VOCAB), (1, VOCAB), (1, VOCAB)]


def test_fused_rows_keep_their_tokens_beside_others_and_where_they_report():
    """The head's own kernel (its torch reference here) draws what has no rules."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(VOCAB, 16, generator=generator)
    hidden = torch.randn(6, 16, generator=generator)
    head = HeadCalls(logits=lambda rows: rows @ weight.t(), weight=weight, bias=None)

    def drawn(rows: list[Sequence], chosen: list[int]) -> Any:
        ops = replace(select_ops("torch"), backend="triton")
        sampler = Sampler(ops, head, torch.device("cpu"))
        return sampler.sample(hidden, rows, torch.tensor(chosen)), sampler.used

    reports = SamplingParams(top_logprobs=4, entropy=True)
    params = [SamplingParams(), SamplingParams(top_k=5), reports, SamplingParams(temperature=0.5)]
    rows = [sequence(p, uid=i) for i, p in enumerate(params)]
    together, used = drawn(rows, [5, 0, 3, 2])
    assert used == {"gumbel_max", "inverse_cdf"}
    for index, place in enumerate((5, 0, 3, 2)):
        alone, _ = drawn([rows[index]], [place])
        assert together.tokens[index] == alone.tokens[0]
        assert together.logprobs[index] == pytest.approx(alone.logprobs[0], abs=1e-5)
        assert together.raw_logprobs[index] == pytest.approx(alone.raw_logprobs[0], abs=1e-5)
    silent, used = drawn([sequence(SamplingParams(), uid=2)], [3])
    assert silent.tokens == [together.tokens[2]] and used == {"gumbel_max"}
    exact = (hidden[3].double() @ weight.t().double()).log_softmax(-1)
    best = exact.topk(4)
    assert [token for token, _ in together.top_logprobs[2]] == best.indices.tolist()
    assert together.entropies == {2: pytest.approx(float(-(exact.exp() * exact).sum()), abs=1e-5)}
