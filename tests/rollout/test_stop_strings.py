"""Stop strings against the plain rule: the first step whose whole text holds one."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tritonhybrid.stop_strings import StopStrings

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "stop",
    "END",
    ".",
    ",",
    "\n",
    "n't",
    "höher",
    "中",
    "😀",
]


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's scheme: all bytes, and words with the space before them."""
    vocab = {name: i for i, name in enumerate(sorted(ByteLevel.alphabet()))}
    for word in WORDS:
        for text in (word, " " + word):
            pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
            vocab.setdefault(pieces[0][0], len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama's scheme: a space is a mark, the first one is left out, bytes fill the gaps."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for word in WORDS:
        for text in (word, "▁" + word):
            vocab.setdefault(text, len(vocab))
    vocab.setdefault("▁", len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return finished(tokenizer)


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


def by_the_plain_rule(
    tokenizer: Any, ids: list[int], stop: tuple[str, ...], skips: bool = True
) -> tuple[int, str] | None:
    for step in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:step], skip_special_tokens=skips)
        found = [text.find(s) for s in stop if s in text]
        if found:
            return step, text[: min(found)]
    return None


def step_by_step(
    tokenizer: Any, ids: list[int], stop: tuple[str, ...], skips: bool = True
) -> tuple[int, str] | None:
    stops = StopStrings(tokenizer, stop, skips)
    for step in range(1, len(ids) + 1):
        text = stops.cut(ids[:step])
        if text is not None:
            return step, text
    return None


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The bytes of a text, a token each: a character lies across several."""
    vocab = tokenizer.get_vocab()
    if "<0x41>" in vocab:
        return [vocab[f"<0x{byte:02X}>"] for byte in text.encode()]
    return tokenizer(text, add_special_tokens=False).input_ids


def random_output(tokenizer: Any, chance: random.Random, length: int) -> list[int]:
    """Words, characters in bytes, special tokens and bytes that are no characters."""
    ids: list[int] = []
    size = len(tokenizer)
    words = range(257, size)
    while len(ids) < length:
        kind = chance.random()
        if kind < 0.6:
            ids.append(chance.choice(words))
        elif kind < 0.8:
            ids += encoded(tokenizer, chance.choice(WORDS))
        elif kind < 0.9:
            ids += [chance.randrange(1, 257) for _ in range(chance.choice([1, 2, 40]))]
        else:
            ids += [size - 1] * chance.choice([1, 2, 40])
    return ids[:length]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skips", [True, False])
def test_a_stop_string_ends_at_the_same_token_with_the_same_text_as_by_the_plain_rule(
    name: str, skips: bool
):
    tokenizer = TOKENIZERS[name]
    chance = random.Random(hash((skips, len(name))))
    num_found = 0
    for _ in range(300):
        ids = random_output(tokenizer, chance, chance.choice([5, 30, 120]))
        text = tokenizer.decode(ids, skip_special_tokens=False)
        stop = []
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(text) or 1)
            piece = text[at : at + chance.choice([1, 2, 6, 20])].replace("\ufffd", "")
            stop.append(piece or chance.choice(WORDS))
        expected = by_the_plain_rule(tokenizer, ids, tuple(stop), skips)
        assert step_by_step(tokenizer, ids, tuple(stop), skips) == expected, (ids, stop)
        num_found += expected is not None
    assert num_found > 150


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_over_several_tokens_is_found_with_its_last_byte(name: str):
    tokenizer = TOKENIZERS[name]
    ids = encoded(tokenizer, "höher 中😀!")
    assert len(ids) > len("höher 中😀!")
    step, text = step_by_step(tokenizer, ids, ("😀",))
    assert (step, text) == (len(ids) - 1, "höher 中")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_are_text_only_where_they_are_not_skipped(name: str):
    tokenizer = TOKENIZERS[name]
    ids = [*encoded(tokenizer, "cat"), len(tokenizer) - 1, *encoded(tokenizer, "mat")]
    assert step_by_step(tokenizer, ids, ("tm",)) == (len(ids) - 2, "ca")
    assert step_by_step(tokenizer, ids, ("<end>",)) is None
    assert step_by_step(tokenizer, ids, ("<end>",), skips=False) == (4, "cat")


class Counting:
    """A tokenizer that counts the tokens it is made to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.num_tokens = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.num_tokens += len(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_token_costs_the_same_however_long_the_text_has_grown(name: str):
    tokenizer = Counting(TOKENIZERS[name])
    ids = [i for i in random_output(TOKENIZERS[name], random.Random(1), 4000) if i > 256]
    stops = StopStrings(tokenizer, ("nowhere to be found",), True)
    costs = []
    for step in range(1, len(ids) + 1):
        stops.cut(ids[:step])
        costs.append(tokenizer.num_tokens)
    half = len(costs) // 2
    assert costs[-1] - costs[half] < 1.2 * costs[half]
    assert costs[-1] < 40 * len(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("token", [0x81, -1], ids=["half a character", "special"])
def test_tokens_that_never_become_text_do_not_gather(name: str, token: int):
    vocab = TOKENIZERS[name].get_vocab()
    bad = vocab["<0x81>"] if "<0x81>" in vocab else vocab["ģ"]
    chosen = len(TOKENIZERS[name]) - 1 if token < 0 else bad
    tokenizer = Counting(TOKENIZERS[name])
    stops = StopStrings(tokenizer, ("cat",), True)
    for step in range(1, 1001):
        assert stops.cut([chosen] * step) is None
    before = tokenizer.num_tokens
    for step in range(1001, 1101):
        stops.cut([chosen] * step)
    assert tokenizer.num_tokens - before < 100 * 1500
