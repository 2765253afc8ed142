"""Which noise a sequence samples with: seeds, keys and identities."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def sequence_key(seed: int, sample_index: int) -> int:
    """The 64-bit philox key of one sample, mixed from its seed and index.

    Args:
        seed: Of the call or of the prompt's SamplingParams.
        sample_index: Which of the prompt's n samples.

    Returns:
        A signed 64-bit integer. For one seed, distinct indices give distinct keys;
        neighbouring seeds share none (a plain sum would).

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied twice.
    """
    return signed64(_mix(_mix(seed & _MASK) + sample_index))


def default_uid(rank: int, prompt_index: int) -> int:
    """Identity of a prompt that the caller gave none: rank and local index."""
    return signed64((rank << 32) | prompt_index)


def signed64(value: int) -> int:
    """The same 64 bits as a signed integer, as torch stores them."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
