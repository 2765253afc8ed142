"""Failures on purpose on rank 1, and what a call that fails leaves behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from models import hf_greedy, plain_copy, ragged_prompts, tokens
from training_state import differences, snapshot

from tritonhybrid import SamplingParams

GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)
PROMPTS = ragged_prompts(4)


class Caught(NamedTuple):
    """The name and text of what a call raised, and the seconds it took."""

    error: str
    seconds: float


def rank() -> int:
    return torch.distributed.get_rank()


def fail() -> None:
    raise ZeroDivisionError("on purpose")


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@contextmanager
def acting(owner: Any, name: str, at: int, act: Callable[[], None]) -> Iterator[None]:
    """On rank 1, act before the ``at``-th call of a function from now."""
    original = getattr(owner, name)
    count = 0

    def acted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at and rank() == 1:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, acted)
    try:
        yield
    finally:
        setattr(owner, name, original)


def caught(call: Callable[[], Any]) -> Caught:
    start = time.monotonic()
    try:
        call()
        text = "nothing"
    except BaseException as error:
        text = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return Caught(text, time.monotonic() - start)


def aftermath(engine: Any, call: Callable[[], Any]) -> dict[str, Any]:
    """What a call raised and how long it took, and what of the training state it changed."""
    before = snapshot(engine)
    error, seconds = caught(call)
    return {
        "error": error,
        "seconds": seconds,
        "changed": differences(before, snapshot(engine)),
    }


def rollout_beside_hf(engine: Any) -> dict[str, Any]:
    """Tokens of one more rollout, and those that HF's generate gives."""
    return {
        "tokens": tokens(engine.rollout(PROMPTS, GREEDY)),
        "hf_tokens": hf_greedy(plain_copy(engine), PROMPTS, GREEDY.max_new_tokens),
    }
