"""CUDA graphs of decode steps: one for each batch bucket, kept as long as no address changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch

# Whether "auto" uses graphs where they exist. Off until a GPU has run them.
GRAPHS_BY_DEFAULT: Final = False

# Decode steps between two looks at the host where graphs are on.
STEPS_PER_REPLAY: Final = 4

# Seconds that an engine may spend capturing, its whole life long: addresses that change with
# every call would otherwise cost more than the replays save.
CAPTURE_LIMIT_S: Final = 120.0

_SMALL_BUCKETS: Final = (1, 2, 4, 8)
_BUCKET_STEP: Final = 16


class Replayable(Protocol):
    """A captured body; ``torch.cuda.CUDAGraph`` is one."""

    def replay(self) -> None:
        """Run the body again, on the addresses it was captured with."""
        ...


# Captures a body that may run before, and returns what runs it again.
Capture = Callable[[Callable[[], None]], Replayable]


class CudaCapture:
    """Captures on the current CUDA device; all its graphs share one memory pool.

    Unverified: no GPU has run it.

    Source: PyTorch's notes on CUDA graphs (docs.pytorch.org/docs/stable/notes/cuda.html).
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Replayable:
        """Run a body once on a side stream, so that everything is compiled, then capture it.

        Raises:
            RuntimeError: The body does what no graph may hold.
        """
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            body()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may call CUDA in the meantime.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        return graph


@dataclass(frozen=True)
class GraphKey:
    """What is captured once.

    Args:
        num_rows: The bucket.
        num_steps: Decode steps in it, one after the other.
        draw: How its rows sample.
    """

    num_rows: int
    num_steps: int
    draw: Hashable


def bucket(num_rows: int) -> int:
    """The least of 1, 2, 4, 8, 16, 32, 48, ... that holds so many rows."""
    for size in _SMALL_BUCKETS:
        if num_rows <= size:
            return size
    return -(-num_rows // _BUCKET_STEP) * _BUCKET_STEP


class DecodeGraphs:
    """Captured decode steps, call after call.

    A bucket is captured when it is first asked for, a call's largest before the others, so
    that the smaller ones find room in the pool's memory.

    Args:
        new_capture: Makes what makes bodies replayable; asked again when all graphs are
            thrown away, for a memory pool whose graphs are gone takes no more.
        limit_s: Seconds of capturing after which nothing more is captured.
        clock: Seconds.
    """

    def __init__(
        self,
        new_capture: Callable[[], Capture],
        *,
        limit_s: float = CAPTURE_LIMIT_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._new_capture = new_capture
        self._capture: Capture | None = None
        self._limit_s = limit_s
        self._clock = clock
        self._graphs: dict[GraphKey, Replayable] = {}
        self._addresses: Hashable = None
        self._largest = 0
        self._run: Callable[[GraphKey], None] | None = None
        self._blank: Callable[[GraphKey], None] | None = None
        self.capture_s = 0.0
        self.num_replays = 0
        self.num_captures = 0
        self.num_recaptures = 0
        self.reason: str | None = None

    @property
    def keys(self) -> tuple[GraphKey, ...]:
        """What is captured now, in that order."""
        return tuple(self._graphs)

    def begin(
        self,
        addresses: Hashable,
        *,
        largest: int,
        run: Callable[[GraphKey], None],
        blank: Callable[[GraphKey], None],
    ) -> None:
        """Start a call: what was captured serves it if every address is the one captured.

        Args:
            addresses: Of all that the steps read and write, and what else is captured with them.
            largest: Most rows that a step of the call can have.
            run: Carries the steps of a key out.
            blank: Makes every row padding, so that the steps of a key change nothing.
        """
        if addresses != self._addresses:
            self.num_recaptures += len(self._graphs)
            self.release()
        self._addresses = addresses
        self._largest = bucket(largest)
        self._run = run
        self._blank = blank

    def end(self) -> None:
        """End a call: nothing of it is held on to but the graphs."""
        self._run = None
        self._blank = None

    def release(self) -> None:
        """Throw all graphs away; their memory may be given back."""
        self._graphs.clear()
        self._capture = None
        self._addresses = None

    def has(self, key: GraphKey) -> bool:
        """Whether a key is captured, or can be now.

        It is captured here if it is not yet; the rows are padding then.
        """
        if key in self._graphs:
            return True
        if self.reason is None:
            first = replace(key, num_rows=max(self._largest, key.num_rows))
            if not self._graphs and first != key:
                self._add(first)
            self._add(key)
        return key in self._graphs

    def replay(self, key: GraphKey) -> None:
        """Run the steps of a captured key."""
        self._graphs[key].replay()
        self.num_replays += 1

    def _add(self, key: GraphKey) -> None:
        assert self._run is not None and self._blank is not None, "between begin and end"
        if self.reason is not None:
            return
        if self.capture_s >= self._limit_s:
            self.reason = (
                f"capturing took {self.capture_s:.1f} s of at most {self._limit_s:g} s, for "
                f"{self.num_captures} graphs; no more are captured"
            )
            return
        self._blank(key)
        start = self._clock()
        try:
            if self._capture is None:
                self._capture = self._new_capture()
            self._graphs[key] = self._capture(lambda: self._run_now(key))
            self.num_captures += 1
        except Exception as error:
            # What was captured before may be broken with it.
            self.release()
            self.reason = f"capturing failed: {type(error).__name__}: {error}"
        finally:
            self.capture_s += self._clock() - start

    def _run_now(self, key: GraphKey) -> None:
        """The steps of a key by the call that runs now: a replay in Python is of any call."""
        assert self._run is not None, "between begin and end"
        self._run(key)


class FixedTensors:
    """Named tensors whose memory stays where it is, call after call, while what it holds fits."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Of each place."""
        return tuple((name, memory.data_ptr()) for name, memory in self._memory.items())

    def keep(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Copy ``rows`` [R, ...] to their place and return it; it grows by doubling.

        Args:
            name: Of the place.
            rows: Contiguous.
        """
        memory = self._memory.get(name)
        if (
            memory is None
            or (memory.dtype, memory.shape[1:]) != (rows.dtype, rows.shape[1:])
            or memory.shape[0] < rows.shape[0]
        ):
            capacity = 1 << max(rows.shape[0] - 1, 0).bit_length()
            memory = rows.new_zeros(capacity, *rows.shape[1:])
            self._memory[name] = memory
        place = memory[: rows.shape[0]]
        place.copy_(rows)
        return place
