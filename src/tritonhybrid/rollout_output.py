"""What a rollout returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tritonhybrid.errors import EngineStateError, explain
from tritonhybrid.sequence import FinishReason, Sequence, TopLogprobs
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
        finish_reason: "stop" (EOS, stop token or string), "length", "abort" (the caller
            gave the prompt up) or "budget" (the call's token budget was spent; the rollout
            can be resumed).
        text: Decoded completion, cut before a stop string; None without a tokenizer.
        top_logprobs: For each token the ``top_logprobs`` likeliest (token id, raw
            log-probability) at its position, best first; empty unless asked for.
        entropies: For each token the entropy, in nats, of the unfiltered distribution at
            temperature 1 at its position; empty unless asked for.
        policy_versions: For each token the engine's optimizer steps (``global_steps``) when it
            was sampled; they differ where a rollout was resumed with new weights.
    """

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    finish_reason: FinishReason | Literal["budget"]
    text: str | None = None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    policy_versions: list[int] = field(default_factory=list)


@dataclass(eq=False)
class PausedRollout:
    """What a rollout has left to do after its token budget was spent.

    Belongs to the engine that made it; ``engine.resume`` goes on, once.

    Args:
        sequences: Those that have not ended, in input order.
        owner: Who may resume it.
        is_resumed: Whether that has happened.
    """

    sequences: list[Sequence]
    owner: object
    is_resumed: bool = False

    def take_up(self, owner: object) -> list[Sequence]:
        """What is left to do, for the one who may do it.

        Raises:
            EngineStateError: It was done before, or belongs to another engine.
        """
        if self.owner is not owner or self.is_resumed:
            got = "one that was resumed before" if self.is_resumed else "another engine's"
            raise EngineStateError(
                explain(
                    "A paused rollout is resumed once, by the engine that paused it",
                    expected="RolloutOutput.paused of this engine's latest part of the rollout",
                    got=got,
                    hint="Pass the paused rollout of the newest output.",
                )
            )
        return self.sequences

    @property
    def num_tokens(self) -> int:
        """Tokens sampled so far for the sequences that have not ended."""
        return sum(len(sequence.output) for sequence in self.sequences)


@dataclass(frozen=True, kw_only=True)
class RolloutOutput:
    """All completions of a call: n per prompt, adjacent, in input order.

    Args:
        completions: Of a resumed rollout those that had not ended before, whole.
        stats: Of the call.
        paused: What is left to do where the token budget was spent first; else None.
    """

    completions: list[Completion]
    stats: RolloutStats
    paused: PausedRollout | None = None
