"""The errors a user of tritonhybrid can meet.

Every message says the rule, what was expected, what was found and what to do.
All of them can be pickled, so they cross process boundaries unharmed.
"""

from __future__ import annotations

from tritonhybrid_kernels.errors import KernelArgumentError, TritonHybridError

__all__ = [
    "CacheExhaustedError",
    "ConfigError",
    "EngineStateError",
    "KernelArgumentError",
    "NonFiniteLogitsError",
    "RankFailureError",
    "TritonHybridError",
    "UnsupportedModelError",
    "explain",
]


# What to do once ranks are out of step.
GROUP_LOST = (
    "The process group is lost: start the ranks again, from a checkpoint. "
    "If a rank was only slow, raise sync_timeout_s."
)


def explain(rule: str, *, expected: object, got: object, hint: str) -> str:
    """Word an error in the house's four parts: rule, expected, got, what to do."""
    return f"{rule}: expected {expected}, got {got}. {hint}"


class ConfigError(TritonHybridError, ValueError):
    """A setting or an argument is unknown, out of range or not available yet."""


class UnsupportedModelError(TritonHybridError, NotImplementedError):
    """The model can't be served at all (an encoder, for example)."""


class EngineStateError(TritonHybridError, RuntimeError):
    """A call came at the wrong time (wrapped twice, nested rollout, not wrapped)."""


class CacheExhaustedError(TritonHybridError, RuntimeError):
    """A sequence can't fit the key-value cache, however the others are scheduled."""


class NonFiniteLogitsError(TritonHybridError, RuntimeError):
    """The model gave NaN or infinite logits, or every token of a row is masked.

    Args:
        prompt_index: Which prompt of the call, counted from 0.
        position: Index of the token that was to be sampled, prompt included.
        detail: What was seen.
    """

    def __init__(self, prompt_index: int, position: int, detail: str) -> None:
        self.prompt_index = prompt_index
        self.position = position
        self.detail = detail
        super().__init__(
            explain(
                "Sampling needs finite logits",
                expected="at least one finite logit and no NaN",
                got=f"{detail} for prompt {prompt_index} at position {position}",
                hint="Check the last optimizer step (learning rate, loss scale); "
                "the engine is unchanged and can train on.",
            )
        )

    def __reduce__(self) -> tuple[type[NonFiniteLogitsError], tuple[int, int, str]]:
        """Rebuild from the constructor's own arguments when unpickled."""
        return type(self), (self.prompt_index, self.position, self.detail)


class RankFailureError(TritonHybridError, RuntimeError):
    """Another rank failed during a call that every rank takes part in.

    Args:
        rank: Global rank that raised, died or hangs.
        message: Its error, in one line.
        is_group_lost: Whether it failed inside a collective: the process group is out of
            step, and nothing collective works any more.
    """

    def __init__(self, rank: int, message: str, is_group_lost: bool = False) -> None:
        self.rank = rank
        self.message = message
        self.is_group_lost = is_group_lost
        hint = (
            GROUP_LOST
            if is_group_lost
            else "Nothing was lost on this rank; mend the cause there and call again."
        )
        super().__init__(f"rank {rank} failed during a collective rollout: {message} {hint}")

    def __reduce__(self) -> tuple[type[RankFailureError], tuple[int, str, bool]]:
        """Rebuild from the constructor's own arguments when unpickled."""
        return type(self), (self.rank, self.message, self.is_group_lost)
