"""Microseconds of one call on the device: CUDA-graph replays over rotating inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def graph_us(calls: Sequence[Callable[[], object]], replays: int) -> list[float]:
    """Capture one run of all `calls` in a graph and return microseconds a call of each replay.

    Replaying leaves the host's launch cost out, which would rank small kernels by Python.

    Raises:
        RuntimeError: a call can't be captured (it reads the device on the host).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return _event_us(graph.replay, len(calls), replays)


def eager_us(calls: Sequence[Callable[[], object]], replays: int) -> list[float]:
    """Return microseconds a call of each pass over `calls`, launched one by one."""

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()
    return _event_us(all_calls, len(calls), replays)


def _event_us(run: Callable[[], object], count: int, replays: int) -> list[float]:
    values = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        values.append(start.elapsed_time(end) * 1000 / count)
    return values


def host_us(calls: Sequence[Callable[[], object]], replays: int) -> list[float]:
    """Return microseconds a call on the CPU, where a call ends when it returns."""
    values = []
    for _ in range(replays):
        start = time.perf_counter()
        for call in calls:
            call()
        values.append((time.perf_counter() - start) * 1e6 / len(calls))
    return values
