"""Which of longrope's two tables rotates a token."""

from __future__ import annotations

from dataclasses import dataclass

from tritonhybrid.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """The rule by which Hugging Face's generate changes tables, for a sequence alone.

    A forward rotates all its tokens by the long table if it reaches past ``original``
    positions: so does a prompt, and each sampled token by its own position. Keys in the
    cache stay as they were rotated, unless the model's generate starts anew there.

    A table of rows for this rule holds the short table's ``original`` rows, then the long one.

    Args:
        original: Positions that the short table is for.
        starts_anew: Whether a sequence that outgrows them is computed anew, with the long
            table for all its tokens (as Phi-3's generate does).
    """

    original: int
    starts_anew: bool

    @property
    def recompute_at(self) -> int | None:
        """Length at which a sequence's pages are void."""
        return self.original + 1 if self.starts_anew else None

    def changed_under(self, sequence: Sequence) -> bool:
        """Whether a sequence began with the short table and one forward over it takes the long."""
        return len(sequence.prompt) <= self.original < len(sequence)

    def row(self, sequence: Sequence, position: int) -> int:
        """Row of the token at ``position`` of a sequence."""
        length = len(sequence) if self.starts_anew else len(sequence.prompt)
        is_long = position >= self.original or length > self.original
        return position + self.original if is_long else position
