"""One rank over gloo for the engines of this room."""

from pathlib import Path

import pytest
import torch.distributed as dist

from tritonhybrid.local_engine import join_ranks


@pytest.fixture(scope="session", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not dist.is_initialized():
        rendezvous: Path = tmp_path_factory.mktemp("ranks") / "meeting"
        join_ranks(0, 1, "cpu", rendezvous)
