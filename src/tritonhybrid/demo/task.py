"""The demo's task: write the given digits in ascending order; anyone can check an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

PAD, BOS, EOS, SEPARATOR = range(4)
DIGIT_0 = 4
VOCAB_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class SortingTask:
    """Sort digits: ``BOS 3 1 2 SEPARATOR`` wants ``1 2 3 EOS``.

    Demonstrations are noisy on purpose: most show the descending order, so a model that
    imitates them answers right with about ``correct_share`` and has to learn the rest from
    the reward.

    Args:
        min_digits: Fewest digits of a prompt, at least 1.
        max_digits: Most digits of a prompt.
        correct_share: Share of the demonstrations that are right.
    """

    min_digits: int = 6
    max_digits: int = 8
    correct_share: float = 0.35

    @property
    def max_new_tokens(self) -> int:
        """Tokens of the longest right answer, EOS included."""
        return self.max_digits + 1

    def prompts(self, num_prompts: int, rng: random.Random) -> list[list[int]]:
        """Draw prompts of mixed length as token ids."""
        return [
            [BOS, *(DIGIT_0 + rng.randrange(10) for _ in range(self._length(rng))), SEPARATOR]
            for _ in range(num_prompts)
        ]

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """Return the one right completion of a prompt, EOS included."""
        return [*sorted(prompt[1:-1]), EOS]

    def verify(self, prompt: Sequence[int], completion: Sequence[int]) -> float:
        """Reward a completion: 1.0 where it is the right one, token for token, else 0.0."""
        return float(list(completion) == self.answer(prompt))

    def demonstration(self, prompt: Sequence[int], rng: random.Random) -> list[int]:
        """Return a completion to imitate: right with ``correct_share``, else descending."""
        digits = sorted(prompt[1:-1], reverse=rng.random() >= self.correct_share)
        return [*digits, EOS]

    def render(self, token_ids: Sequence[int]) -> str:
        """Write token ids for people: digits as digits, EOS as a full stop."""
        signs = {EOS: ".", SEPARATOR: "->", BOS: "", PAD: "_"}
        words = [signs.get(token, str(token - DIGIT_0)) for token in token_ids]
        return " ".join(word for word in words if word)

    def _length(self, rng: random.Random) -> int:
        return rng.randint(self.min_digits, self.max_digits)
