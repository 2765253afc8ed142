"""One sequence of a rollout: its tokens, its pages and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.stop_strings import StopStrings

FinishReason = Literal["stop", "length", "abort"]

# The likeliest tokens of one position with their raw log-probabilities, best first.
TopLogprobs = list[tuple[int, float]]


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt and the tokens sampled for it so far.

    Args:
        prompt_index: Which prompt of the call, in input order.
        sample_index: Which of the prompt's n samples.
        uid: 64-bit identity that the noise depends on.
        key: 64-bit philox key, mixed from seed and sample index.
        prompt: Prompt token ids.
        prompt_key: Equal for sequences whose prompts are equal, so that one
            prefill can serve them.
        params: Sampling settings.
        end_ids: Token ids that end the sequence with reason "stop".
        policy_version: Of the weights that sample now; each token keeps the one it came from.
        on_token: Called with each token as it is taken; what it raises ends the call.
    """

    prompt_index: int
    sample_index: int
    uid: int
    key: int
    prompt: tuple[int, ...]
    prompt_key: int
    params: SamplingParams
    end_ids: frozenset[int]
    policy_version: int = 0
    policy_versions: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    text: str | None = None
    stops: StopStrings | None = None
    on_token: Callable[[int], None] | None = None

    def __len__(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def tokens(self) -> list[int]:
        """Prompt and output in one list."""
        return [*self.prompt, *self.output]

    def token(self, position: int) -> int:
        """The token at ``position``."""
        own = position - len(self.prompt)
        return self.output[own] if own >= 0 else self.prompt[position]

    @property
    def last_token(self) -> int:
        """The newest token: sampled, not yet in the cache."""
        return self.output[-1] if self.output else self.prompt[-1]

    @property
    def max_length(self) -> int:
        """Tokens when it has sampled all it may."""
        return len(self.prompt) + self.params.max_new_tokens

    @property
    def num_left(self) -> int:
        """Tokens that it may still sample."""
        return self.max_length - len(self)

    @property
    def host_rule(self) -> str | None:
        """What has the host prepare each of its tokens; None where the device goes on alone."""
        params = self.params
        if params.has_penalties:
            return "penalties"
        if params.has_token_rules:
            return "rules for single tokens"
        if len(self.output) < params.min_new_tokens:
            return "min_new_tokens"
        if params.top_logprobs or params.entropy:
            return "top_logprobs or entropy"
        return None

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be sampled."""
        return self.finish_reason is not None

    def append(
        self,
        token: int,
        logprob: float,
        raw_logprob: float,
        top_logprobs: TopLogprobs | None = None,
        entropy: float | None = None,
    ) -> None:
        """Take one sampled token and notice whether it was the last."""
        self.output.append(token)
        self.policy_versions.append(self.policy_version)
        if self.params.logprobs:
            self.logprobs.append(logprob)
            self.raw_logprobs.append(raw_logprob)
        if top_logprobs is not None:
            self.top_logprobs.append(top_logprobs)
        if entropy is not None:
            self.entropies.append(entropy)
        if token in self.end_ids:
            self.finish_reason = "stop"
        elif len(self.output) >= self.params.max_new_tokens:
            self.finish_reason = "length"
        if self.on_token is not None:
            self.on_token(token)

    def notice_stop_strings(self, tokenizer: Any) -> None:
        """End if the text now holds a stop string; the text is cut before it.

        Args:
            tokenizer: Decodes the output; not used without stop strings.
        """
        if not self.params.stop:
            return
        if self.stops is None:
            self.stops = StopStrings(tokenizer, self.params.stop, self.params.skip_special_tokens)
        text = self.stops.cut(self.output)
        if text is not None:
            self.finish_reason = "stop"
            self.text = text
