"""One gloo rank in this process, and the tiny engines of tests/distributed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tritonhybrid.local_engine import join_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))


@pytest.fixture(scope="session", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not dist.is_initialized():
        join_ranks(0, 1, "cpu", tmp_path_factory.mktemp("ranks") / "rendezvous")


@pytest.fixture(scope="module", autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """ZeRO-3 swaps ``nn.functional.linear`` for the whole process and leaves it so."""
    linear, threads = nn.functional.linear, torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    nn.functional.linear = linear
