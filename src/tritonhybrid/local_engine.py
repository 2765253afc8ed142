"""A DeepSpeed engine on this machine without a launcher or a compiler: what the commands use."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonhybrid.errors import ConfigError, explain

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class LocalEngineConfig:
    """What the commands let a user choose about their engine.

    Args:
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3.
        dtype: Name of the dtype of the weights: float32, bfloat16 or float16.
        device: "cpu" or "cuda", as returned by :func:`choose_device`.
        micro_batch_size: Sequences a rank trains on in one step.
        lr: AdamW's learning rate.

    Raises:
        ConfigError: The stage or the dtype is none of the above.
    """

    zero_stage: int = 3
    dtype: str = "float32"
    device: str = "cpu"
    micro_batch_size: int = 1
    lr: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse what DeepSpeed would refuse later, or read otherwise."""
        if self.zero_stage not in range(4):
            raise ConfigError(
                explain(
                    "The ZeRO stage is one of DeepSpeed's",
                    expected="0, 1, 2 or 3",
                    got=self.zero_stage,
                    hint="Pass --zero 0, 1, 2 or 3.",
                )
            )
        if self.dtype not in DTYPES:
            raise ConfigError(
                explain(
                    "The dtype names one that DeepSpeed trains in",
                    expected=f"one of {', '.join(DTYPES)}",
                    got=self.dtype,
                    hint="Pass --dtype with one of these names.",
                )
            )
        if self.dtype == "float16" and self.device == "cpu":
            raise ConfigError(
                explain(
                    "DeepSpeed trains in float16 on an accelerator only",
                    expected="float32 or bfloat16 on the CPU",
                    got="float16",
                    hint="Pass --dtype bfloat16.",
                )
            )

    def deepspeed_config(self) -> dict[str, Any]:
        """The JSON DeepSpeed is started with.

        ``torch_adam`` keeps it from compiling its own AdamW on first use (85 s on two cores).
        """
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000_000,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": self.lr, "weight_decay": 0.0, "torch_adam": True},
            },
            "zero_optimization": {"stage": self.zero_stage},
        }
        if self.dtype == "bfloat16":
            config["bf16"] = {"enabled": True}
        elif self.dtype == "float16":
            config["fp16"] = {"enabled": True}
        return config


def choose_device(wish: str, *, num_ranks: int = 1) -> str:
    """Settle the device, and tell DeepSpeed before it looks for itself.

    Call it before deepspeed is first imported: it sets DS_ACCELERATOR, which keeps a CPU
    run off the GPU of the machine.

    Args:
        wish: "auto" (CUDA where there is any), "cpu" or "cuda".
        num_ranks: Processes that will each take a device of their own on CUDA.

    Returns:
        "cpu" or "cuda".

    Raises:
        ConfigError: CUDA was asked for and fewer than ``num_ranks`` devices are there.
    """
    device = wish
    if wish != "cpu":
        import torch

        num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = "cuda" if wish == "cuda" or num_devices >= num_ranks else "cpu"
    if device == "cuda" and num_devices < num_ranks:
        raise ConfigError(
            explain(
                "Each rank takes a CUDA device of its own",
                expected=f"{num_ranks} or more devices that torch can see",
                got=num_devices,
                hint="Pass --device cpu, or install a CUDA build of torch.",
            )
        )
    os.environ["DS_ACCELERATOR"] = device
    return device


def join_ranks(rank: int, num_ranks: int, device: str, rendezvous: Path) -> None:
    """Start torch.distributed and DeepSpeed on top of it, without a launcher.

    Every rank must call this. On CPU DeepSpeed's shared-memory collectives are set aside:
    it would compile them at this point (65 to 90 s, and an error without a compiler).

    Args:
        rank: This process, 0 to num_ranks - 1.
        num_ranks: Processes of the run, all on this machine.
        device: "cpu" (gloo) or "cuda" (nccl).
        rendezvous: A path that does not exist yet in a directory that does; the ranks
            meet there. A file needs no port that another program could take meanwhile.
    """
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
    )
    import deepspeed

    hush()
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        import torch

        torch.cuda.set_device(rank)
    deepspeed.init_distributed(
        "gloo" if device == "cpu" else "nccl",
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=num_ranks,
    )


def leave_ranks() -> None:
    """Take torch.distributed down, so that the interpreter ends without its warning."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_engine(model: torch.nn.Module, config: LocalEngineConfig) -> Any:
    """Put a model under DeepSpeed; every rank must call this with the same weights.

    Args:
        model: An HF model whose weights have the config's dtype; ZeRO-3 partitions it in place.
        config: Stage, dtype, device and optimizer.

    Returns:
        The DeepSpeedEngine.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=config.deepspeed_config(),
    )
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set AdamW's learning rate for the steps to come."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def hush() -> None:
    """Keep DeepSpeed's and transformers' start-up chatter off the terminal of a command.

    Errors and warnings of consequence still show; the filters name deepspeed 0.19.8's calls
    that torch 2.13 renamed and go when it follows.
    """
    warnings.filterwarnings(
        "ignore",
        message=r".*(all_gather_into_tensor|reduce_scatter_tensor)",
        category=FutureWarning,
    )
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
    # A name given at run time: transformers' logging module types its re-exports loosely.
    hf_logging = importlib.import_module("transformers.utils.logging")
    hf_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
