"""The ops as torch operators, ``torch.ops.tritonhybrid.<op>``, for torch.compile and torch.export.

Importing this module registers them. A tracer sees one opaque operator with a schema, a shape rule
and the arguments it overwrites; the CUDA key runs the Triton launcher, the CPU key the torch path,
or the launcher under Triton's interpreter. What only saves memory or tunes a launch (``out``,
``workspace``, ``config``) is not in the schemas: no result may be one of an operator's arguments,
and a tracer plans memory itself. No gradient is registered. Eager callers take the launchers from
:func:`tritonhybrid_kernels.ops.select_ops` and are spared the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from tritonhybrid_kernels.launch import is_interpreted
from tritonhybrid_kernels.ops import OP_NAMES, select_ops

NAMESPACE: Final = "tritonhybrid"


def _rows_like_weight(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _projections(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        x.new_empty(x.shape[0], weight.shape[0]) for weight in (q_weight, k_weight, v_weight)
    )
    return q, k, v


def _token_and_logprob(logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch = logits.shape[0]
    return logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.float32)


def _token_and_logprobs(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, logprobs = _token_and_logprob(hidden)
    return tokens, logprobs, torch.empty_like(logprobs)


_ATTENTION: Final = (
    "SymInt? window=None, float? softcap=None, Tensor? sinks=None, Tensor? alibi_slopes=None"
)

# By name: the arguments, the results, and the shapes of the results.
_SCHEMAS: Final[dict[str, tuple[str, str, Callable[..., Any]]]] = {
    "add_rms_norm": (
        "Tensor x, Tensor weight, float eps, *, Tensor(a!)? residual=None, float weight_offset=0.0",
        "Tensor",
        _like_first,
    ),
    "linear": (
        "Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None",
        "Tensor",
        _rows_like_weight,
    ),
    "qkv_linear": (
        "Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? q_bias=None, "
        "Tensor? k_bias=None, Tensor? v_bias=None",
        "(Tensor, Tensor, Tensor)",
        _projections,
    ),
    "gate_up_silu": (
        "Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias=None, "
        'Tensor? up_bias=None, *, str activation="silu"',
        "Tensor",
        _rows_like_weight,
    ),
    "rope_kv_write": (
        "Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor? cos, Tensor? sin, Tensor positions, "
        "Tensor slot_mapping, Tensor(c!) k_cache, Tensor(d!) v_cache, *, "
        "Tensor? q_norm_weight=None, Tensor? k_norm_weight=None, float norm_eps=1e-6",
        "()",
        _nothing,
    ),
    "attention_varlen": (
        "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_seqlens_q, "
        f"Tensor context_lens, *, float scale, SymInt? max_seqlen_q=None, {_ATTENTION}",
        "Tensor",
        _like_first,
    ),
    "paged_attention_decode": (
        "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor context_lens, *, "
        f"float scale, SymInt? num_splits=None, {_ATTENTION}",
        "Tensor",
        _like_first,
    ),
    "sample_logits": (
        "Tensor logits, Tensor keys, Tensor uids, Tensor positions, Tensor greedy",
        "(Tensor, Tensor)",
        _token_and_logprob,
    ),
    "lm_head_sample": (
        "Tensor hidden, Tensor weight, Tensor? bias=None, *, Tensor temperature, Tensor keys, "
        "Tensor uids, Tensor positions, float logit_scale=1.0, float? softcap=None",
        "(Tensor, Tensor, Tensor)",
        _token_and_logprobs,
    ),
    "decode_advance": (
        "Tensor tokens, Tensor logprobs, Tensor raw_logprobs, *, Tensor(a!) input_ids, "
        "Tensor(b!) positions, Tensor(c!) next_positions, Tensor(d!) slot_mapping, "
        "Tensor(e!) context_lens, Tensor(f!) steps, Tensor last_positions, Tensor block_table, "
        "SymInt block_size, Tensor(g!) ring_tokens, Tensor(h!) ring_logprobs, "
        "Tensor(i!) ring_raw_logprobs, Tensor(j!)? rope_rows=None, SymInt rope_original=0",
        "()",
        _nothing,
    ),
}


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    launchers = select_ops("triton")
    on_cpu = launchers if is_interpreted() else select_ops("torch")
    # Rows must stay contiguous as the launchers check them.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for name in OP_NAMES:
        arguments, results, shapes = _SCHEMAS[name]
        library.define(f"{name}({arguments}) -> {results}", tags=tags)
        library.impl(name, getattr(launchers, name), "CUDA")
        library.impl(name, getattr(on_cpu, name), "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=library)
    return library


# The registrations live as long as this object.
_LIBRARY: Final = _register()
