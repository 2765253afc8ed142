"""What a rollout returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from tritonhybrid.sequence import FinishReason, TopLogprobs
from tritonhybrid.stats import RolloutStats


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled continuation of one prompt.

    Args:
        prompt_index: Which prompt of the call, in input order.
        sample_index: Which of its n samples.
        token_ids: Sampled tokens; the ending EOS or stop token is among them.
        logprobs: Log-probability of each token under the distribution it was
            sampled from (temperature and filters applied; raw when greedy).
        raw_logprobs: The same under the unfiltered distribution at temperature 1.
        finish_reason: "stop" (EOS, stop token or string) or "length".
        text: Decoded completion, cut before a stop string; None without a tokenizer.
        top_logprobs: For each token the ``top_logprobs`` likeliest (token id, raw
            log-probability) at its position, best first; empty unless asked for.
        entropies: For each token the entropy, in nats, of the unfiltered distribution at
            temperature 1 at its position; empty unless asked for.
    """

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    finish_reason: FinishReason
    text: str | None = None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RolloutOutput:
    """All completions of a call: n per prompt, adjacent, in input order."""

    completions: list[Completion]
    stats: RolloutStats
