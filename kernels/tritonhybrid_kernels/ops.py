"""The set of ops a container calls, chosen once: Triton launchers or their torch paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Literal

from tritonhybrid_kernels.launch import reject


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One callable an op, with the contract of the launcher of the same name.

    Attributes:
        backend: "triton" or "torch", as selected.
        torch_ops: names of the ops that run their torch path although the backend is "triton".
    """

    backend: Literal["triton", "torch"]
    torch_ops: frozenset[str]
    add_rms_norm: Callable[..., Any]
    linear: Callable[..., Any]
    qkv_linear: Callable[..., Any]
    gate_up_silu: Callable[..., Any]
    rope_kv_write: Callable[..., Any]
    attention_varlen: Callable[..., Any]
    paged_attention_decode: Callable[..., Any]
    sample_logits: Callable[..., Any]
    lm_head_sample: Callable[..., Any]


OP_NAMES: tuple[str, ...] = tuple(
    field.name for field in fields(Ops) if field.name not in ("backend", "torch_ops")
)


def select_ops(backend: Literal["triton", "torch"], torch_ops: frozenset[str] = frozenset()) -> Ops:
    """Build the set of ops for a backend.

    Args:
        backend: "triton" (CUDA tensors, or CPU tensors under the interpreter) or "torch".
        torch_ops: ops that run their torch path with the "triton" backend too.

    Raises:
        KernelArgumentError: unknown backend or op name.
    """
    if backend not in ("triton", "torch"):
        raise reject("select_ops: unknown backend", "triton or torch", backend, "Pass one of them.")
    unknown = torch_ops - set(OP_NAMES)
    if unknown:
        raise reject(
            "select_ops: torch_ops names an unknown op",
            f"names out of {', '.join(OP_NAMES)}",
            ", ".join(sorted(unknown)),
            "Correct the name.",
        )
    chosen: dict[str, Callable[..., Any]] = {}
    for name in OP_NAMES:
        suffix = "_ref" if backend == "torch" or name in torch_ops else ""
        module = import_module(f"tritonhybrid_kernels.{name}")
        chosen[name] = getattr(module, name + suffix)
    return Ops(backend=backend, torch_ops=torch_ops, **chosen)
