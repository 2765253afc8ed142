"""The set of ops a container calls, chosen once: Triton launchers or their torch paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from tritonhybrid_kernels.add_rms_norm import add_rms_norm, add_rms_norm_ref
from tritonhybrid_kernels.attention_varlen import attention_varlen, attention_varlen_ref
from tritonhybrid_kernels.decode_advance import decode_advance, decode_advance_ref
from tritonhybrid_kernels.gate_up_silu import gate_up_silu, gate_up_silu_ref
from tritonhybrid_kernels.launch import require
from tritonhybrid_kernels.linear import linear, linear_ref
from tritonhybrid_kernels.lm_head_sample import lm_head_sample, lm_head_sample_ref
from tritonhybrid_kernels.paged_attention_decode import (
    paged_attention_decode,
    paged_attention_decode_ref,
)
from tritonhybrid_kernels.qkv_linear import qkv_linear, qkv_linear_ref
from tritonhybrid_kernels.rope_kv_write import rope_kv_write, rope_kv_write_ref
from tritonhybrid_kernels.sample_logits import sample_logits, sample_logits_ref


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
    decode_advance: Callable[..., Any]


# By name: the Triton launcher and the torch path.
_IMPLEMENTATIONS: Final[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "add_rms_norm": (add_rms_norm, add_rms_norm_ref),
    "linear": (linear, linear_ref),
    "qkv_linear": (qkv_linear, qkv_linear_ref),
    "gate_up_silu": (gate_up_silu, gate_up_silu_ref),
    "rope_kv_write": (rope_kv_write, rope_kv_write_ref),
    "attention_varlen": (attention_varlen, attention_varlen_ref),
    "paged_attention_decode": (paged_attention_decode, paged_attention_decode_ref),
    "sample_logits": (sample_logits, sample_logits_ref),
    "lm_head_sample": (lm_head_sample, lm_head_sample_ref),
    "decode_advance": (decode_advance, decode_advance_ref),
}

OP_NAMES: Final = tuple(_IMPLEMENTATIONS)


def select_ops(backend: Literal["triton", "torch"], torch_ops: frozenset[str] = frozenset()) -> Ops:
    """Build the set of ops for a backend.

    Args:
        backend: "triton" (CUDA tensors, or CPU tensors under the interpreter) or "torch".
        torch_ops: ops that run their torch path with the "triton" backend too.

    Raises:
        KernelArgumentError: unknown backend or op name.
    """
    require(
        backend in ("triton", "torch"),
        "select_ops: unknown backend",
        "triton or torch",
        backend,
        "Pass one of them.",
    )
    unknown = torch_ops - _IMPLEMENTATIONS.keys()
    require(
        not unknown,
        "select_ops: torch_ops names an unknown op",
        f"names out of {', '.join(OP_NAMES)}",
        ", ".join(sorted(unknown)),
        "Correct the name.",
    )
    chosen = {
        name: torch_path if backend == "torch" or name in torch_ops else launcher
        for name, (launcher, torch_path) in _IMPLEMENTATIONS.items()
    }
    return Ops(backend=backend, torch_ops=torch_ops, **chosen)
