"""How the tokens of one prompt are sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from tritonhybrid.errors import ConfigError, explain


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one prompt; the names and meanings are vLLM's and HF's.

    Logits are processed in the order of HF's generate: logit_bias, repetition_penalty,
    frequency_penalty and presence_penalty (vLLM's; HF has none), bad_words_ids,
    min_new_tokens, forced tokens, suppressed tokens, temperature, top_k, top_p, min_p.
    A greedy row takes the best token of what stands before temperature.

    Args:
        max_new_tokens: Most tokens to sample, at least 1.
        min_new_tokens: Ends (EOS, stop tokens) are masked before this many tokens.
        temperature: Divides the logits; 0 means greedy.
        top_p: Keep the smallest set of tokens with at least this mass, in (0, 1].
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        min_p: Keep tokens with at least this share of the likeliest one's probability.
        repetition_penalty: HF's: logits of seen tokens are divided (positive) or
            multiplied (negative) by it; 1 is off.
        presence_penalty: vLLM's: taken off the logit of each token that the completion
            (not the prompt) holds, in [-2, 2].
        frequency_penalty: vLLM's: taken off once for each time that the completion holds
            the token, in [-2, 2].
        logit_bias: Added to the logits of single tokens; -inf forbids one.
        bad_words_ids: Token sequences that are never completed; prompt and completion
            count. A word of one end token is ignored, as in HF.
        suppress_tokens: Tokens that are never sampled.
        begin_suppress_tokens: Tokens that are not sampled first (after a forced BOS: second).
        forced_bos_token_id: HF's: the token that follows a prompt of one token.
        forced_eos_token_id: The token that stands last where max_new_tokens is reached;
            of several the sampler takes one.
        n: Samples per prompt; they share the prompt's cache pages.
        seed: Fixes the call's noise. None takes the engine's next seed.
        eos_token_id: Tokens that end a completion; None takes generation_config's.
        stop_token_ids: More tokens that end a completion.
        stop: Strings that end a completion; needs a tokenizer.
        skip_special_tokens: Leave special tokens out of the text, also where stop
            strings are sought.
        ignore_eos: Sample on past EOS (stop tokens and strings still end it).
        logprobs: Return the log-probability of each sampled token.
        top_logprobs: Return so many of the likeliest tokens at each position with their
            raw log-probabilities; 0 returns none. Changes no token.
        entropy: Return the entropy of the raw distribution at each position, in nats.
            Changes no token.

    Raises:
        ConfigError: A value is out of its range.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    n: int = 1
    seed: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: bool = True
    top_logprobs: int = 0
    entropy: bool = False

    def __post_init__(self) -> None:
        """Check every range once, so that the loop never has to."""
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("min_new_tokens", self.min_new_tokens, 0)
        _whole("n", self.n, 1)
        _whole("top_k", self.top_k, 0)
        _real(
            "temperature",
            self.temperature,
            lambda x: x == 0 or _is_divisor(x),
            "0 or a number in [1e-6, 1e6]",
        )
        _real("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1]")
        _real("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        _real("repetition_penalty", self.repetition_penalty, _is_divisor, "a number in [1e-6, 1e6]")
        for name in ("presence_penalty", "frequency_penalty"):
            _real(name, getattr(self, name), lambda x: -2 <= x <= 2, "a number in [-2, 2]")
        _whole("top_logprobs", self.top_logprobs, 0)
        for name in ("ignore_eos", "logprobs", "entropy"):
            _flag(name, getattr(self, name))
        _flag("skip_special_tokens", self.skip_special_tokens)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                explain(
                    "SamplingParams.min_new_tokens can't exceed max_new_tokens",
                    expected=f"<= {self.max_new_tokens}",
                    got=self.min_new_tokens,
                    hint="Lower min_new_tokens or raise max_new_tokens.",
                )
            )
        if self.seed is not None:
            _whole("seed", self.seed, None)
        for name in ("eos_token_id", "forced_eos_token_id"):
            _token_ids(name, listed(getattr(self, name)))
        if self.forced_bos_token_id is not None:
            _token_ids("forced_bos_token_id", (self.forced_bos_token_id,))
        for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"):
            _token_ids(name, getattr(self, name))
        _check_words(self.bad_words_ids)
        _check_bias(self.logit_bias)
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = set(listed(getattr(self, name)))
            if forced and forced <= set(self.suppress_tokens):
                raise ConfigError(
                    explain(
                        f"SamplingParams.{name} can't be suppressed as a whole",
                        expected="a forced token that is not in suppress_tokens",
                        got=sorted(forced),
                        hint=f"Take it out of {name} or suppress_tokens, or to put an end off "
                        "use min_new_tokens.",
                    )
                )
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, Sequence) or any(
            not isinstance(text, str) or not text for text in self.stop
        ):
            raise ConfigError(
                explain(
                    "SamplingParams.stop takes strings that are not empty",
                    expected="non-empty strings",
                    got=repr(self.stop),
                    hint="Remove the empty entries.",
                )
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether the logits of a token depend on where it has stood before."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def has_token_rules(self) -> bool:
        """Whether single tokens are biased, forbidden or forced, ends before their time aside."""
        return (
            bool(self.logit_bias)
            or len(self.bad_words_ids) > 0
            or len(self.suppress_tokens) > 0
            or len(self.begin_suppress_tokens) > 0
            or self.forced_bos_token_id is not None
            or len(listed(self.forced_eos_token_id)) > 0
        )

    @property
    def has_constraints(self) -> bool:
        """Whether single tokens are biased, forbidden or forced."""
        return self.has_token_rules or self.min_new_tokens > 0

    @property
    def has_filters(self) -> bool:
        """Whether sampling needs the logits of the whole vocabulary."""
        filtered = not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return filtered or self.has_penalties or self.has_constraints


def listed(ids: int | Sequence[int] | None) -> Sequence[int]:
    """One token id, several or none, as several."""
    return () if ids is None else (ids,) if isinstance(ids, int) else ids


def _is_divisor(value: float) -> bool:
    """Whether logits divided by it stay numbers in fp32."""
    return 1e-6 <= value <= 1e6


def _whole(name: str, value: object, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        expected = "a whole number"
    elif least is not None and value < least:
        expected = f"a whole number >= {least}"
    else:
        return
    raise ConfigError(
        explain(
            f"SamplingParams.{name} is out of range",
            expected=expected,
            got=repr(value),
            hint=f"Pass {name}={least or 0} or more.",
        )
    )


def _token_ids(name: str, ids: object) -> None:
    if (
        isinstance(ids, Collection)
        and not isinstance(ids, str | bytes)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
    ):
        return
    raise ConfigError(
        explain(
            f"SamplingParams.{name} holds token ids",
            expected="whole numbers",
            got=repr(ids),
            hint=f"Pass {name} as a list of token ids.",
        )
    )


def _check_words(words: object) -> None:
    is_list = isinstance(words, Collection) and not isinstance(words, str | bytes)
    if not is_list or any(
        not isinstance(word, Collection) or isinstance(word, str | bytes) or not word
        for word in words  # type: ignore[attr-defined]
    ):
        raise ConfigError(
            explain(
                "SamplingParams.bad_words_ids holds words, each a list of token ids",
                expected="lists that are not empty",
                got=repr(words),
                hint="Tokenise each word without special tokens and pass the lists.",
            )
        )
    for word in words:  # type: ignore[attr-defined]
        _token_ids("bad_words_ids", word)


def _check_bias(bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise ConfigError(
            explain(
                "SamplingParams.logit_bias maps token ids to numbers",
                expected="a dict",
                got=repr(bias),
                hint="Pass logit_bias={token id: bias}.",
            )
        )
    _token_ids("logit_bias", bias.keys())
    for token, value in bias.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or math.isnan(value) or value == math.inf:
            raise ConfigError(
                explain(
                    "SamplingParams.logit_bias is out of range",
                    expected="finite numbers, or -inf",
                    got=f"{value!r} for token {token}",
                    hint="Force a token with a large finite bias.",
                )
            )


def _flag(name: str, value: object) -> None:
    if isinstance(value, bool):
        return
    raise ConfigError(
        explain(
            f"SamplingParams.{name} is a switch",
            expected="True or False",
            got=repr(value),
            hint=f"Pass {name}=True or leave it out.",
        )
    )


def _real(name: str, value: object, is_in_range: Callable[[float], bool], expected: str) -> None:
    # Comparisons alone: a whole number may be too large for a float.
    if isinstance(value, int | float) and not isinstance(value, bool) and is_in_range(value):
        return
    raise ConfigError(
        explain(
            f"SamplingParams.{name} is out of range",
            expected=expected,
            got=repr(value),
            hint=f"Set {name} within its range.",
        )
    )
