"""How the tokens of one prompt are sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tritonhybrid.errors import ConfigError, explain


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one prompt; the names and meanings are vLLM's and HF's.

    Args:
        max_new_tokens: Most tokens to sample, at least 1.
        min_new_tokens: Ends (EOS, stop tokens) are masked before this many tokens.
        temperature: Divides the logits; 0 means greedy.
        top_p: Keep the smallest set of tokens with at least this mass, in (0, 1].
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        min_p: Keep tokens with at least this share of the likeliest one's probability.
        repetition_penalty: HF's: logits of seen tokens are divided (positive) or
            multiplied (negative) by it; 1 is off.
        n: Samples per prompt; they share the prompt's cache pages.
        seed: Fixes the call's noise. None takes the engine's next seed.
        eos_token_id: Tokens that end a completion; None takes generation_config's.
        stop_token_ids: More tokens that end a completion.
        stop: Strings that end a completion; needs a tokenizer.
        ignore_eos: Sample on past EOS (stop tokens and strings still end it).
        logprobs: Return the log-probability of each sampled token.

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
    n: int = 1
    seed: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: bool = True

    def __post_init__(self) -> None:
        """Check every range once, so that the loop never has to."""
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("min_new_tokens", self.min_new_tokens, 0)
        _whole("n", self.n, 1)
        _whole("top_k", self.top_k, 0)
        _real("temperature", self.temperature, lambda x: x >= 0, "a number >= 0")
        _real("top_p", self.top_p, lambda x: 0 < x <= 1, "a number in (0, 1]")
        _real("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        _real("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "a number > 0")
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
        eos = self.eos_token_id
        _token_ids("eos_token_id", () if eos is None else (eos,) if isinstance(eos, int) else eos)
        _token_ids("stop_token_ids", self.stop_token_ids)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ConfigError(
                explain(
                    "SamplingParams.stop takes strings that are not empty",
                    expected="non-empty strings",
                    got=list(self.stop),
                    hint="Remove the empty entries.",
                )
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def has_filters(self) -> bool:
        """Whether sampling needs the logits of the whole vocabulary."""
        filtered = not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return filtered or self.repetition_penalty != 1 or self.min_new_tokens > 0


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


def _real(name: str, value: object, is_in_range: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, int | float) and math.isfinite(value) and is_in_range(value):
        return
    raise ConfigError(
        explain(
            f"SamplingParams.{name} is out of range",
            expected=expected,
            got=repr(value),
            hint=f"Set {name} within its range.",
        )
    )
