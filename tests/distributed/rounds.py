"""Random rounds for two ranks: what each is to do, drawn from a seed alike in every process."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from models import EOS, VOCAB

from tritonhybrid import SamplingParams

WORLD_SIZE = 2
# Rounds that one engine lives for.
SPELL = 10
# Of the longest prompt and completion together.
MAX_PROMPT = 30
LONGEST = MAX_PROMPT + 24
# Keys and values of a token: 3 layers, 2 heads of 16 numbers of 4 bytes.
_BYTES_PER_TOKEN = 2 * 3 * 2 * 16 * 4
_STAGES = (3, 0, 3, 2, 3, 0, 3, 1)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, on one rank.

    Args:
        kind: One of the keys of ``REFUSED``, or of ``BROKEN``.
        rank: Where.
        at: At which call of ``op``, or after how many completions, counted from 0.
        op: Of ours; what happens to it is in ``kind``.
    """

    kind: str
    rank: int
    at: int = 0
    op: str = ""


# Refused before anything has run, with these words.
REFUSED = {
    "token outside": "ConfigError: Prompt 0 holds a token id outside the vocabulary",
    "empty prompt": "ConfigError: Prompt 0 is empty",
    "longer than the model": "ConfigError: Prompt 0 plus max_new_tokens exceeds",
    "a uid twice": "ConfigError: uids are distinct",
    "budget of nothing": "ConfigError: token_budget is out of range",
}
# Broken off where it happens, if it comes to that.
BROKEN = {
    "all masked": "NonFiniteLogitsError: ",
    "op raises": "ZeroDivisionError: on purpose",
    "op gives nan": "NonFiniteLogitsError: ",
    "op is interrupted": "KeyboardInterrupt: ",
    "consumer raises": "ZeroDivisionError: on purpose",
    "consumer is interrupted": "KeyboardInterrupt: ",
}
_OPS = ("add_rms_norm", "qkv_linear", "linear", "attention_varlen", "paged_attention_decode")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank is to do in a round.

    Args:
        prompts: Token ids; none at all is fine.
        settings: Of SamplingParams, one a prompt.
        uids: One a prompt, or None.
        follows: A prompt that begins with so many tokens of a sequence of an earlier round,
            counted from the latest; its own come behind.
        budgets: Of the rollout and of each resumption.
        aborts: After so many completions of a stream, this prompt is given up.
        closes_after: So many completions; None goes to the end.
    """

    prompts: list[list[int]]
    settings: list[dict[str, Any]]
    uids: list[int] | None = None
    follows: dict[int, tuple[int, int]] = field(default_factory=dict)
    budgets: list[int | None] = field(default_factory=list)
    aborts: dict[int, int] = field(default_factory=dict)
    closes_after: int | None = None

    @property
    def sampling(self) -> list[SamplingParams]:
        """Of each prompt."""
        return [SamplingParams(**settings) for settings in self.settings]


@dataclass(frozen=True, kw_only=True)
class Round:
    """What happens in a round.

    Args:
        seed: Of all rounds.
        index: Of this one.
        act: "rollout", "generate", "stream", "budget" or "train".
        works: By rank.
        fault: If any.
        trains_between: Whether the engine trains between a rollout and its resumption.
        is_left: Whether what is paused is never resumed.
        trains_after: Whether a training step follows.
    """

    seed: int
    index: int
    act: str
    works: list[Work]
    fault: Fault | None = None
    trains_between: bool = False
    is_left: bool = False
    trains_after: bool = False


def draw_settings(seed: int, spell: int) -> tuple[int, dict[str, Any]]:
    """ZeRO stage and HybridConfig of the engine that plays a spell of rounds."""
    rng = random.Random(f"{seed}/spell {spell}")
    config: dict[str, Any] = {
        "block_size": rng.choice([2, 4, 8, 16]),
        "max_num_seqs": rng.choice([1, 2, 5, 64, 64]),
        "max_num_batched_tokens": rng.choice([5, 16, 64, 8192, 8192]),
        "enable_chunked_prefill": rng.random() < 0.4,
        "enable_mixed_steps": rng.random() < 0.4,
        "enable_prefix_caching": rng.random() < 0.7,
        "scheduling_policy": rng.choice(["fcfs", "longest_first"]),
        "release_inference_cache": rng.random() < 0.1,
        "tp_gather_partition_size": rng.choice([1, 2, 8]),
        "sync_timeout_s": 20.0,
    }
    if rng.random() < 0.5:
        size = config["block_size"]
        pages = -(-LONGEST // size) + rng.randrange(8)
        config["kv_cache_bytes"] = pages * size * _BYTES_PER_TOKEN
    return _STAGES[spell % len(_STAGES)], config


def draw_round(seed: int, index: int) -> Round:
    """One round; the same in every process."""
    rng = random.Random(f"{seed}/round {index}")
    act = rng.choice(["rollout", "rollout", "generate", "stream", "stream", "budget", "budget"])
    # So that what ranks have in common, and their own, is found in the pages from earlier calls.
    openings = [_tokens(rng, 16) for _ in range(2)]
    works = [_work(rng, act, openings) for _ in range(WORLD_SIZE)]
    fault = _fault(rng, act) if rng.random() < 0.4 else None
    if fault is not None:
        works[fault.rank] = _spoilt(works[fault.rank], fault)
    return Round(
        seed=seed,
        index=index,
        act=act,
        works=works,
        fault=fault,
        # A training step is every rank's, and resident ranks don't hear of each other's failures.
        trains_between=fault is None and rng.random() < 0.6,
        is_left=fault is None and rng.random() < 0.2,
        trains_after=rng.random() < 0.4,
    )


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def _work(rng: random.Random, act: str, openings: list[list[int]]) -> Work:
    count = rng.choice([0, 1, 2, 3, 4, 5])
    prompts: list[list[int]] = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.15 and prompts:
            prompts.append(list(rng.choice(prompts)))
        elif kind < 0.5:
            opening = rng.choice(openings)[: rng.randint(1, 16)]
            prompts.append([*opening, *_tokens(rng, rng.randint(0, 14))])
        else:
            prompts.append(_tokens(rng, rng.randint(1, 30)))
    one = _settings(rng) if act == "generate" or rng.random() < 0.3 else None
    work = Work(
        prompts=prompts,
        settings=[one or _settings(rng) for _ in prompts],
        uids=[rng.getrandbits(64) - 2**63 for _ in prompts] if rng.random() < 0.5 else None,
    )
    if act != "generate":
        lengths = {i: rng.randint(1, 30) for i in range(count) if rng.random() < 0.25}
        work = replace(work, follows={i: (rng.randrange(6), n) for i, n in lengths.items()})
    if act == "stream":
        num_aborts = rng.choice([0, 1, 3]) if prompts else 0
        aborts = {rng.randrange(6): rng.randrange(count) for _ in range(num_aborts)}
        closes = rng.randrange(6) if rng.random() < 0.3 else None
        return replace(work, aborts=aborts, closes_after=closes)
    if act == "budget":
        budgets = [rng.choice([1, 5, 20, 60, None]) for _ in range(rng.randint(1, 3))]
        return replace(work, budgets=budgets)
    return work


def _settings(rng: random.Random) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "max_new_tokens": rng.choice([1, 2, rng.randint(3, 12), rng.randint(13, 24)]),
        "n": rng.choice([1, 1, 2, 3]),
        "seed": rng.getrandbits(60),
    }
    kind = rng.choice(["greedy", "greedy", "plain", "filtered", "penalised", "ruled"])
    if kind == "greedy":
        settings |= {"temperature": 0.0, "n": 1}
    elif kind == "plain":
        settings |= {"temperature": rng.choice([0.7, 1.0, 1.5])}
    elif kind == "filtered":
        settings |= {"top_p": rng.choice([0.5, 0.9, 1.0]), "top_k": rng.choice([0, 5, 40])}
        settings |= {"min_p": rng.choice([0.0, 0.05])}
    elif kind == "penalised":
        settings |= {"temperature": rng.choice([0.0, 1.0]), "repetition_penalty": 1.3}
        settings |= {"presence_penalty": 0.5, "frequency_penalty": rng.choice([0.0, 0.4])}
    else:
        settings |= {"suppress_tokens": _tokens(rng, 8), "logit_bias": {5: 2.0, 7: -1.5}}
        settings |= {"bad_words_ids": [_tokens(rng, 1), _tokens(rng, 2)]}
    ends = rng.random()
    if ends < 0.5:
        settings |= {"eos_token_id": [EOS, *_tokens(rng, rng.choice([4, 15]))]}
    elif ends < 0.7:
        settings |= {"ignore_eos": True}
    elif ends < 0.85:
        settings |= {"stop_token_ids": _tokens(rng, 10)}
        settings |= {"min_new_tokens": min(3, settings["max_new_tokens"])}
    return settings


def _fault(rng: random.Random, act: str) -> Fault:
    kinds = ["token outside", "longer than the model", "all masked"]
    if act != "generate":
        kinds += ["empty prompt", "a uid twice", "budget of nothing"]
    kinds += ["op raises", "op gives nan", "op is interrupted"]
    if act == "stream":
        kinds += ["consumer raises", "consumer is interrupted"]
    kind = rng.choice(kinds)
    return Fault(
        kind=kind,
        rank=rng.randrange(WORLD_SIZE),
        at=rng.choice([0, 1, 3, 10, 40]) if kind.startswith("op") else rng.randrange(3),
        op=rng.choice(_OPS) if kind.startswith("op") else "",
    )


def _spoilt(work: Work, fault: Fault) -> Work:
    """A rank's work with what is bad about it, if the badness is in its arguments."""
    if not fault.op:
        work = replace(work, follows={})
    if not work.prompts:
        work = replace(work, prompts=[[5, 6, 7]], settings=[{"max_new_tokens": 9, "seed": 1}])
        work = replace(work, uids=None)
    (first, *others), (own, *rest) = work.prompts, work.settings
    if fault.kind == "token outside":
        return replace(work, prompts=[[*first, VOCAB], *others])
    if fault.kind == "empty prompt":
        return replace(work, prompts=[[], *others])
    if fault.kind == "longer than the model":
        return replace(work, settings=[own | {"max_new_tokens": 128}, *rest])
    if fault.kind == "a uid twice":
        twice = [first, first, *others]
        return replace(work, prompts=twice, settings=[own, own, *rest], uids=[7] * len(twice))
    if fault.kind == "budget of nothing":
        return replace(work, budgets=[0, *work.budgets[1:]])
    if fault.kind == "all masked":
        masked = own | {"suppress_tokens": list(range(VOCAB)), "min_new_tokens": 0}
        # Met in any case.
        return replace(work, settings=[masked, *rest], aborts={}, closes_after=None)
    return work
