"""Processed logits against Hugging Face's own processors, and the histories behind them."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from tritonhybrid.logit_rules import LogitRules
from tritonhybrid.noise import sequence_key
from tritonhybrid.sampler import process_logits
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.seen_tokens import SeenTokens
from tritonhybrid.sequence import Sequence

CPU = torch.device("cpu")
NUM_CASES = 10_000
# As much of a model as GenerationMixin._get_logits_processor asks for.
NO_MODEL = SimpleNamespace(
    config=SimpleNamespace(is_encoder_decoder=False),
    _merge_criteria_processor_list=lambda ours, given: ours,
)


def sequence(
    params: SamplingParams,
    prompt: tuple[int, ...],
    output: list[int],
    ends: frozenset[int] = frozenset(),
) -> Sequence:
    return Sequence(
        prompt_index=0,
        sample_index=0,
        uid=0,
        key=sequence_key(0, 0),
        prompt=prompt,
        prompt_key=0,
        params=params,
        end_ids=ends,
        output=output,
    )


def random_case(chance: random.Random, vocab: int) -> Sequence:
    """Settings in random combination, each off in most cases, behind a random history."""

    def token() -> int:
        return chance.randrange(vocab)

    def tokens(least: int, most: int) -> list[int]:
        return [token() for _ in range(chance.randint(least, most))]

    def rarely(value: Any, default: Any, share: float = 0.3) -> Any:
        return value if chance.random() < share else default

    max_new_tokens = chance.randint(1, 9)
    output = [
        token() for _ in range(chance.choice([0, 1, max_new_tokens - 1, max_new_tokens // 2]))
    ]
    output = output[: max_new_tokens - 1]
    prompt = tuple(tokens(1, chance.choice([1, 2, 12])))
    history = [*prompt, *output]
    words = [tokens(1, 4) for _ in range(chance.randint(1, 4))]
    # Words that the history is about to complete.
    words += [[*history[-chance.randint(1, len(history)) :], token()] for _ in range(2)]
    ends = frozenset(tokens(0, 3))
    if all(len(word) == 1 and word[0] in ends for word in words):
        words.append([token(), token()])
    bos = rarely(token(), None, 0.2)
    eos = rarely(chance.choice([[token()], tokens(1, 3)]), [], 0.2)
    suppressed = rarely(tokens(1, 5), [])
    if bos in suppressed or set(eos) & set(suppressed) == set(eos):
        # HF and we refuse to suppress all that is forced.
        suppressed = [t for t in suppressed if t not in (bos, *eos)]
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=rarely(chance.randint(0, max_new_tokens), 0),
        temperature=chance.choice([0.0, 0.3, 1.0, 1.0, 1.7, 100.0]),
        top_k=rarely(chance.choice([1, 2, 5, vocab, vocab + 7]), 0),
        top_p=rarely(chance.choice([0.95, 0.9, 0.5, 0.1, 1e-6]), 1.0),
        min_p=rarely(chance.choice([0.05, 0.5, 1.0]), 0.0),
        repetition_penalty=rarely(chance.choice([1.3, 0.7, 2.0]), 1.0, 0.4),
        logit_bias=rarely(
            {token(): chance.choice([-math.inf, -3.5, 0.1, 20.0]) for _ in range(4)}, None
        ),
        bad_words_ids=rarely(words, ()),
        suppress_tokens=suppressed,
        begin_suppress_tokens=rarely(tokens(1, 5), ()),
        forced_bos_token_id=bos,
        forced_eos_token_id=eos[0] if len(eos) == 1 and chance.random() < 0.5 else eos or None,
    )
    return sequence(params, prompt, output, ends)


def random_logits(chance: random.Random, vocab: int) -> torch.Tensor:
    normal = torch.randn(vocab, generator=torch.Generator().manual_seed(chance.getrandbits(40)))
    kind = chance.randrange(8)
    if kind == 0:
        return (2 * normal).round()
    if kind == 1:
        return torch.zeros(vocab)
    if kind == 2:
        return 1e30 * normal
    if kind == 3:
        return 1e-30 * normal
    if kind == 4:
        # The row's best stays, or a model would have masked everything.
        return normal.masked_fill((normal < 0) & (normal < normal.max()), -math.inf)
    return normal * chance.choice([0.1, 3.0, 100.0])


def hf_processed(logits: torch.Tensor, row: Sequence) -> torch.Tensor:
    """What HF's generate makes of the row: its processors as it builds and orders them."""
    p = row.params
    settings: dict[str, Any] = {}
    if not p.is_greedy:
        settings |= {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p}
        settings |= {"min_p": p.min_p or None}
    config = GenerationConfig(
        do_sample=not p.is_greedy,
        max_length=len(row.prompt) + p.max_new_tokens,
        min_new_tokens=p.min_new_tokens or None,
        repetition_penalty=p.repetition_penalty,
        sequence_bias={(t,): float(b) for t, b in p.logit_bias.items()} if p.logit_bias else None,
        bad_words_ids=[list(word) for word in p.bad_words_ids] or None,
        suppress_tokens=list(p.suppress_tokens) or None,
        begin_suppress_tokens=list(p.begin_suppress_tokens) or None,
        forced_bos_token_id=p.forced_bos_token_id,
        forced_eos_token_id=p.forced_eos_token_id,
        **settings,
    )
    ends = sorted(row.end_ids)
    config._eos_token_tensor = torch.tensor(ends) if ends else None
    processors = GenerationMixin._get_logits_processor(
        NO_MODEL, config, input_ids_seq_length=len(row.prompt)
    )
    return processors(torch.tensor([row.tokens]), logits.clone().unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_random_rows_equal_hugging_faces_processors_in_every_element(part: int):
    chance = random.Random(part)
    num_done = num_changed = 0
    while num_done < NUM_CASES // 4:
        vocab = chance.choice([2, 3, 17, 50, 129, 400])
        rows = [random_case(chance, vocab) for _ in range(chance.randint(1, 12))]
        logits = torch.stack([random_logits(chance, vocab) for _ in rows])
        before = logits.clone()
        ours = process_logits(logits, rows)
        assert torch.equal(logits, before)
        for index, row in enumerate(rows):
            theirs = hf_processed(logits[index], row)
            assert torch.equal(ours[index], theirs), (row, logits[index])
            num_changed += not torch.equal(theirs, logits[index])
        num_done += len(rows)
    assert num_changed > num_done / 2


def penalised(logits: torch.Tensor, row: Sequence) -> torch.Tensor:
    """vLLM's penalties after HF's, one token at a time, in double precision."""
    z = logits.double().tolist()
    p = row.params
    for token in set(row.tokens):
        z[token] *= p.repetition_penalty if z[token] < 0 else 1 / p.repetition_penalty
    for token in set(row.output):
        z[token] -= p.frequency_penalty * row.output.count(token) + p.presence_penalty
    return torch.tensor(z, dtype=torch.float64)


def penalties(chance: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=100,
        presence_penalty=chance.choice([0.0, 0.5, -2.0]),
        frequency_penalty=chance.choice([0.0, 0.25, 2.0, -1.0]),
        repetition_penalty=chance.choice([1.0, 1.5]),
    )


def test_presence_and_frequency_count_the_output_alone():
    chance = random.Random(5)
    for _ in range(200):
        rows = [
            sequence(
                penalties(chance),
                tuple(chance.choices(range(20), k=chance.randint(1, 9))),
                chance.choices(range(20), k=chance.randint(0, 30)),
            )
            for _ in range(4)
        ]
        logits = 4 * torch.randn(4, 20)
        ours = process_logits(logits, rows)
        for index, row in enumerate(rows):
            exact = penalised(logits[index], row)
            torch.testing.assert_close(ours[index].double(), exact, rtol=1e-6, atol=1e-5)


def test_histories_kept_step_by_step_equal_those_read_anew_as_rows_come_and_go():
    """Rows end, wait, come back later in another order, and grow by one token or several."""
    chance = random.Random(6)
    vocab = 60
    rules = LogitRules(CPU)
    alive: list[Sequence] = []
    for _ in range(300):
        for row in alive:
            if chance.random() < 0.05:
                row.finish_reason = "stop"
        alive = [row for row in alive if not row.is_finished]
        while len(alive) < 3 or chance.random() < 0.3:
            prompt = tuple(chance.choices(range(vocab), k=chance.randint(1, 20)))
            alive.append(sequence(penalties(chance), prompt, []))
        chance.shuffle(alive)
        now = alive[: chance.randint(1, len(alive))]
        logits = torch.randn(len(now), vocab)
        rules.prepare(now)
        assert torch.equal(rules.apply(logits), process_logits(logits, now) + 0)
        for row in now:
            row.output.extend(chance.choices(range(vocab), k=chance.choice([1, 1, 1, 2])))


def test_rows_of_sequences_that_ended_are_used_again():
    seen = SeenTokens(CPU)
    for _ in range(50):
        rows = [sequence(SamplingParams(frequency_penalty=1.0), (1, 2, 3), [4]) for _ in range(8)]
        seen.prepare(rows)
        for row in rows:
            row.finish_reason = "length"
    assert seen._ids.shape[0] == 8


def test_a_step_uploads_nothing_that_has_not_changed():
    params = SamplingParams(max_new_tokens=9, min_new_tokens=5, suppress_tokens=[3, 4])
    row = sequence(params, (1, 2), [], frozenset({2}))
    rules = LogitRules(CPU)
    rules.prepare([row])
    kept = rules._banned_now.tokens
    for token in (7, 8, 9, 7):
        row.output.append(token)
        rules.prepare([row])
        assert rules._banned_now.tokens is kept
    row.output.append(7)
    rules.prepare([row])
    assert rules._banned_now.tokens.tolist() == []
