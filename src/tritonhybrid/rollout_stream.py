"""Completions as they finish, while the rollout goes on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from collections.abc import Sequence as Sized
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch

from tritonhybrid.call import Call
from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.requests import completions
from tritonhybrid.rollout_output import Completion, PausedRollout
from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import RolloutStats


class RolloutStream(Iterator[Completion]):
    """Yields completions as they finish; from ``engine.rollout_stream``.

    The rollout goes on only while the next completion is asked for. Until the stream is
    exhausted or closed its engine is busy: it neither trains nor starts another call.
    Use it in a ``with`` block, so that it is closed whatever happens::

        with engine.rollout_stream(prompts, sampling) as stream:
            for completion in stream:
                ...

    Args:
        call: Of this stream.
        sequences: All of them.
        steps: Advances the rollout, first to where ``call`` and ``sequences`` are known.
    """

    def __init__(
        self, call: Call, sequences: Sized[Sequence], steps: Generator[Completion, None, None]
    ) -> None:
        self._call = call
        self._sequences = sequences
        self._steps = steps

    def __next__(self) -> Completion:
        """The next completion to finish.

        Raises:
            StopIteration: All have.
            RankFailureError: Another rank failed.
        """
        return next(self._steps)

    def __enter__(self) -> RolloutStream:
        """Nothing more: the rollout has begun."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; an error that leaves the block is this rank's failure, and so every rank's."""
        if error is None or isinstance(error, GeneratorExit):
            self.close()
            return
        try:
            self._steps.throw(error)
        except BaseException as raised:
            # The with statement raises it again; a StopIteration comes back as a cause.
            if error not in (raised, raised.__cause__):
                raise
        finally:
            error.__traceback__ = trace

    def close(self) -> None:
        """Give up what has not finished; with ZeRO-3 the ranks meet as after a whole rollout."""
        self._steps.close()

    def abort(self, prompt_index: int) -> int:
        """Give up a prompt: its unfinished completions come out with reason "abort".

        Args:
            prompt_index: In input order.

        Returns:
            How many completions that ends; 0 where all had ended or were aborted before.

        Raises:
            ConfigError: There is no such prompt in the call.
        """
        own = [s for s in self._sequences if s.prompt_index == prompt_index]
        if not own:
            raise ConfigError(
                explain(
                    "abort takes the index of a prompt of the call",
                    expected=f"one of {sorted({s.prompt_index for s in self._sequences})}",
                    got=prompt_index,
                    hint="Pass a completion's prompt_index.",
                )
            )
        if prompt_index in self._call.aborts:
            return 0
        left = sum(not sequence.is_finished for sequence in own)
        if left:
            self._call.aborts.append(prompt_index)
        return left

    @property
    def stats(self) -> RolloutStats:
        """Figures of the rollout so far; complete once the stream has ended."""
        return self._call.stats

    @property
    def paused(self) -> PausedRollout | None:
        """What is left to do where the token budget was spent; known at the stream's end."""
        return self._call.paused


def stream_steps(
    serving: Iterator[list[Sequence]], call: Call, tokenizer: Any, modes: CallerModes
) -> Generator[Completion, None, None]:
    """Completions out of steps, each handed over in the caller's own surroundings.

    Args:
        serving: Yields sequences as they end; always run to its end.
        call: Of the stream.
        tokenizer: For text; may be None.
        modes: The caller's.
    """
    for finished in serving:
        if call.is_given_up:
            continue
        with modes.restored(), call.interrupts.opened():
            try:
                yield from completions(finished, tokenizer)
            except GeneratorExit:
                call.is_given_up = True


class CallerModes:
    """The grad, inference and autocast modes of whoever makes a call.

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type
        self._has_grad = torch.is_grad_enabled()
        self._is_inference = torch.is_inference_mode_enabled()
        self._has_autocast = torch.is_autocast_enabled(self._kind)
        self._autocast_dtype = torch.get_autocast_dtype(self._kind)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Back in these modes, inside a block that has set others."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._is_inference))
            stack.enter_context(torch.set_grad_enabled(self._has_grad))
            stack.enter_context(
                torch.autocast(self._kind, dtype=self._autocast_dtype, enabled=self._has_autocast)
            )
            yield
