"""The gate before every speed: a provider whose tokens differ has no speed to compare."""

from __future__ import annotations

from collections.abc import Sequence

Tokens = list[list[int]]


def first_difference(reference: Tokens, tokens: Tokens) -> str | None:
    """Return where `tokens` first departs from `reference`, in words; None where they agree."""
    if len(reference) != len(tokens):
        return f"expected {len(reference)} sequences, got {len(tokens)}"
    for index, (expected, got) in enumerate(zip(reference, tokens, strict=True)):
        if expected == got:
            continue
        if len(expected) != len(got):
            return f"sequence {index}: expected {len(expected)} tokens, got {len(got)}"
        for place, (left, right) in enumerate(zip(expected, got, strict=True)):
            if left != right:
                return f"sequence {index}, token {place}: expected {left}, got {right}"
    return None


def agreement(reference: Tokens, tokens: Tokens) -> float:
    """Return the share of tokens before the first difference of each sequence.

    After a difference the two continue other texts, so later matches would be chance.
    """
    total = sum(len(sequence) for sequence in reference)
    same = sum(_common_prefix(a, b) for a, b in zip(reference, tokens, strict=False))
    return same / total if total else 1.0


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))
