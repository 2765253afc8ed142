"""The one container: executes any layer description with the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from tritonhybrid.batch import Batch
from tritonhybrid.containers.description import LayerDescription
from tritonhybrid.containers.joined import joined
from tritonhybrid.containers.projection import Projection, is_plain
from tritonhybrid.containers.rope import RopeTable
from tritonhybrid.kv_cache import PagedKVCache
from tritonhybrid_kernels.ops import Ops


class FusedLayer:
    """One decoder layer on packed tokens.

    Holds the layer's weights by reference for one materialisation; it is no
    ``nn.Module``, so it never enters a state_dict.

    Args:
        layer: The HF layer, parameters whole, DeepSpeed's hooks set aside.
        description: What it computes.
        index: Which layer of the cache is its own.
        ops: The operations to call.
        cache: Keys and values.
        rope: Rows for every position.
    """

    def __init__(
        self,
        layer: nn.Module,
        description: LayerDescription,
        index: int,
        ops: Ops,
        cache: PagedKVCache,
        rope: RopeTable,
    ) -> None:
        d = description
        self.description = d
        self.ops = ops
        self.rope = rope
        self.keys = cache.keys[index]
        self.values = cache.values[index]
        self.input_norm = _weight(layer, d.input_norm)
        self.post_norm = _weight(layer, d.post_attention_norm)
        has_qk_norm = d.qk_norm_eps is not None
        self.q_norm = _weight(layer, d.q_norm) if has_qk_norm else None
        self.k_norm = _weight(layer, d.k_norm) if has_qk_norm else None
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            Projection(attrgetter(path)(layer))
            for path in (
                d.q_proj,
                d.k_proj,
                d.v_proj,
                d.o_proj,
                d.gate_proj,
                d.up_proj,
                d.down_proj,
            )
        )
        self.qkv_is_raw = self.q.is_raw and self.k.is_raw and self.v.is_raw
        # Triton's kernel reads three weights in one launch; torch would call three products.
        self._joined = self._join_qkv() if self.qkv_is_raw and ops.backend == "torch" else None
        # A gated activation with unequal casts would need its own op; these are HF's.
        self.mlp_is_raw = self.gate.is_raw and self.up.is_raw

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All of the layer's."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Advance the residual stream through the layer.

        Args:
            x: [T, D] residual stream; not changed.
            batch: The step's positions and pages; keys and values are written
                into its slots.

        Returns:
            [T, D] new residual stream.
        """
        d, ops = self.description, self.ops
        y = ops.add_rms_norm(x, self.input_norm, d.norm_eps, weight_offset=d.norm_weight_offset)
        q, k, v = self._qkv(y)
        num_tokens = x.shape[0]
        q = q.view(num_tokens, d.num_heads, d.head_dim)
        ops.rope_kv_write(
            q,
            k.view(num_tokens, d.num_kv_heads, d.head_dim),
            v.view(num_tokens, d.num_kv_heads, d.head_dim),
            self.rope.cos,
            self.rope.sin,
            batch.rope_rows,
            batch.slot_mapping,
            self.keys,
            self.values,
            q_norm_weight=self.q_norm,
            k_norm_weight=self.k_norm,
            norm_eps=d.qk_norm_eps or d.norm_eps,
        )
        attended = attend(
            ops, q, self.keys, self.values, batch, scale=d.scale, window=d.window
        ).view(num_tokens, d.num_heads * d.head_dim)
        x = self._add(self.o, attended, x)
        y = ops.add_rms_norm(x, self.post_norm, d.norm_eps, weight_offset=d.norm_weight_offset)
        if self.mlp_is_raw:
            y = ops.gate_up_silu(
                y,
                self.gate.weight,
                self.up.weight,
                self.gate.bias,
                self.up.bias,
                activation=d.activation,
            )
        else:
            y = _ACTIVATION[d.activation](self.gate(y)) * self.up(y)
        return self._add(self.down, y, x)

    def _join_qkv(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias of q, k and v as one matrix, where they lie side by side."""
        projections = (self.q, self.k, self.v)
        weight = joined(*(p.weight for p in projections if p.weight is not None))
        biases = [p.bias for p in projections if p.bias is not None]
        bias = joined(*biases) if len(biases) == len(projections) else None
        if weight is None or (biases and bias is None):
            return None
        return weight, bias

    def _qkv(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.q, self.k, self.v
        if self._joined is not None:
            d = self.description
            kv_columns = d.num_kv_heads * d.head_dim
            both = self.ops.linear(y, *self._joined)
            split: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = both.split(
                (d.num_heads * d.head_dim, kv_columns, kv_columns), dim=1
            )
            return split
        if self.qkv_is_raw:
            out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.ops.qkv_linear(
                y, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias
            )
            return out
        return q(y).contiguous(), k(y).contiguous(), v(y).contiguous()

    def _add(self, projection: Projection, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if projection.is_raw:
            out: torch.Tensor = self.ops.linear(
                y, projection.weight, projection.bias, residual=residual
            )
            return out
        return residual + projection(y)


def attend(
    ops: Ops,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    *,
    scale: float,
    **features: Any,
) -> torch.Tensor:
    """Attention of one step over the pages: decode or prefill, as the batch is.

    Args:
        ops: The operations to call.
        q: [T, H, E].
        keys: [N, S, K, E], this step's keys already written.
        values: [N, S, K, E'].
        batch: The step; its decoding rows come first.
        scale: Factor on the scores.
        features: window, softcap, sinks, alibi_slopes where the layer has them.

    Returns:
        [T, H, E'].
    """
    if batch.cu_seqlens_q is None:
        out: torch.Tensor = ops.paged_attention_decode(
            q, keys, values, batch.block_table, batch.context_lens, scale=scale, **features
        )
        return out
    # The decoding rows come first; where there are some, each kind has its own kernel.
    count = batch.num_decodes
    out = ops.attention_varlen(
        q[count:],
        keys,
        values,
        batch.block_table[count:],
        batch.cu_seqlens_q,
        batch.context_lens[count:],
        scale=scale,
        max_seqlen_q=batch.max_seqlen_q,
        **features,
    )
    if count == 0:
        return out
    first = ops.paged_attention_decode(
        q[:count],
        keys,
        values,
        batch.block_table[:count],
        batch.context_lens[:count],
        scale=scale,
        **features,
    )
    return torch.cat((first, out))


def obstacle(layer: nn.Module, description: LayerDescription) -> str | None:
    """Why the container may not stand in for a layer, or None if it may.

    A hook on any of its modules would not run; only hooks on and below projections do run (see
    Projection). What its norms compute, the probe looks into.

    Raises:
        AttributeError: The layer has no such norm.
    """
    d = description
    projections = (d.q_proj, d.k_proj, d.v_proj, d.o_proj, d.gate_proj, d.up_proj, d.down_proj)
    for path, module in layer.named_modules():
        if not path.startswith(projections) and not is_plain(module):
            return f"{path or 'the layer'} has a hook, a parametrisation or a forward of its own"
    for path, *_ in d.norms:
        layer.get_submodule(path)
    return None


def _weight(layer: nn.Module, path: str) -> torch.Tensor:
    weight: torch.Tensor = attrgetter(path)(layer).weight
    return weight.detach()


_ACTIVATION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
