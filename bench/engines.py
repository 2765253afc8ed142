"""DeepSpeed engines for the bench, without the compiler runs DeepSpeed starts by default."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(rank: int, world_size: int, port: int, device: str) -> None:
    """Join the process group: gloo on CPU, NCCL on CUDA."""
    import deepspeed

    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    # deepspeed 0.19.8 would build this op with a C++ compiler for a minute; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")


def deepspeed_engine(model: Any, zero: int, dtype: torch.dtype, *, trains: bool = True) -> Any:
    """Return an engine in eval mode that owns `model`.

    Args:
        trains: with an optimizer, as in RL; without, no optimizer state takes memory.
    """
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**30,
    }
    if trains:
        # torch_adam: DeepSpeed's own Adam is compiled at first use.
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters() if trains else None, config=config
    )
    engine.eval()
    return engine
