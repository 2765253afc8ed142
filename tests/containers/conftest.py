"""The zoo of tiny families, imported by name, and real DeepSpeed engines for it on one rank."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import nn

import tritonhybrid
from tritonhybrid.local_engine import LocalEngineConfig, join_ranks

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not dist.is_initialized():
        join_ranks(0, 1, "cpu", tmp_path_factory.mktemp("ranks") / "meeting")


@pytest.fixture(scope="module", autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """ZeRO-3 swaps ``nn.functional.linear`` for the whole process and leaves it so."""
    linear = nn.functional.linear
    yield
    nn.functional.linear = linear


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_reach() -> Iterator[None]:
    """DeepSpeed collects garbage for each ZeRO-3 engine: 0.3 s over all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Any]]:
    """Return a function from a model and a ZeRO stage to its wrapped engine."""
    engines = []

    def make(model: nn.Module, stage: int, **settings: Any) -> Any:
        config = LocalEngineConfig(zero_stage=stage).deepspeed_config()
        # Below the threshold, as all parameters of the zoo are, ZeRO-3 leaves them whole.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=config,
        )
        engines.append(engine)
        return tritonhybrid.wrap(engine, config={"block_size": 16, **settings})

    yield make
    for engine in engines:
        tritonhybrid.unwrap(engine)
        engine.destroy()
        # deepspeed 0.19.8 holds on to the module of every ZeRO-3 engine.
        if engine.module in FWD_MODULE_STACK:
            FWD_MODULE_STACK.remove(engine.module)
