"""The inputs each op is benched on: the shapes of real models, as the runner would call them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from workloads import ModelShape

# The runner's default tokens a page.
PAGE = 64

# Keys a sequence has in the decode cases; the length of each prompt in the prefill cases.
CONTEXT = 1024


@dataclass(frozen=True)
class Inputs:
    """One call's arguments; `written` are those the op changes in place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    written: tuple[torch.Tensor, ...] = ()

    def call(self, op: Callable[..., Any]) -> list[torch.Tensor]:
        """Run the op and return everything it wrote or returned."""
        result = op(*self.args, **self.kwargs)
        returned = () if result is None else result if isinstance(result, tuple) else (result,)
        return [*returned, *self.written]


@dataclass(frozen=True)
class OpCase:
    """One op on one shape.

    Attributes:
        make: fresh random inputs; every call allocates a set of its own.
        bytes: least traffic, each input read and each output written once.
        flops: multiplications and additions.
        sdpa: where given, torch's own attention on a fresh set of the same sizes, its keys and
            values contiguous and unpaged: the bar without paging.
    """

    op: str
    label: str
    make: Callable[[], Inputs]
    bytes: int
    flops: int
    sdpa: Callable[[], Callable[[], torch.Tensor]] | None = None


class Case:
    """Builds the cases of one model in one dtype on one device."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: str) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.size = dtype.itemsize

    def _random(self, *sizes: int, scale: float = 1.0) -> torch.Tensor:
        # Real activations, never zeros: those read faster than any data.
        return torch.randn(*sizes, dtype=self.dtype, device=self.device) * scale

    def _weight(self, out: int, into: int) -> torch.Tensor:
        return self._random(out, into, scale=into**-0.5)

    def _case(
        self,
        op: str,
        what: str,
        tokens: int,
        make: Callable[[], Inputs],
        elements: int,
        flops: int,
        sdpa: Callable[[], Callable[[], torch.Tensor]] | None = None,
    ) -> OpCase:
        label = f"{self.shape.name} {what} T={tokens}"
        return OpCase(op, label, make, elements * self.size, flops, sdpa)

    def _sdpa(self, batch: int, queries: int, keys: int) -> Callable[[], torch.Tensor]:
        shape = self.shape
        q = self._random(batch, shape.num_heads, queries, shape.head_dim)
        k, v = self._random(2, batch, shape.num_kv_heads, keys, shape.head_dim)
        return lambda: functional.scaled_dot_product_attention(
            q, k, v, is_causal=queries > 1, enable_gqa=True
        )

    def add_rms_norm(self, tokens: int) -> Iterator[OpCase]:
        width = self.shape.hidden_size

        def make() -> Inputs:
            residual = self._random(tokens, width)
            arguments = (self._random(tokens, width), self._random(width), 1e-6)
            return Inputs(arguments, {"residual": residual}, (residual,))

        elements = 4 * tokens * width + width
        yield self._case("add_rms_norm", "norm", tokens, make, elements, 8 * tokens * width)

    def linear(self, tokens: int) -> Iterator[OpCase]:
        shape = self.shape
        inputs = {"o": shape.num_heads * shape.head_dim, "down": shape.intermediate_size}
        for what, into in inputs.items():
            out = shape.hidden_size

            def make(out: int = out, into: int = into) -> Inputs:
                arguments = (self._random(tokens, into), self._weight(out, into))
                return Inputs(arguments, {"residual": self._random(tokens, out)})

            elements = out * into + tokens * (into + 2 * out)
            yield self._case("linear", what, tokens, make, elements, 2 * tokens * out * into)

    def qkv_linear(self, tokens: int) -> Iterator[OpCase]:
        shape = self.shape
        q, kv, width = (
            shape.num_heads * shape.head_dim,
            shape.num_kv_heads * shape.head_dim,
            shape.hidden_size,
        )

        def make() -> Inputs:
            weights = (self._weight(q, width), self._weight(kv, width), self._weight(kv, width))
            return Inputs((self._random(tokens, width), *weights))

        out = q + 2 * kv
        elements = out * width + tokens * (width + out)
        yield self._case("qkv_linear", "qkv", tokens, make, elements, 2 * tokens * out * width)

    def gate_up_silu(self, tokens: int) -> Iterator[OpCase]:
        width, inner = self.shape.hidden_size, self.shape.intermediate_size

        def make() -> Inputs:
            weights = (self._weight(inner, width), self._weight(inner, width))
            return Inputs((self._random(tokens, width), *weights))

        elements = 2 * inner * width + tokens * (width + inner)
        yield self._case("gate_up_silu", "mlp", tokens, make, elements, 4 * tokens * inner * width)

    def rope_kv_write(self, tokens: int) -> Iterator[OpCase]:
        shape = self.shape
        heads, kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_dim
        blocks = -(-tokens // PAGE)

        def make() -> Inputs:
            q = self._random(tokens, heads, size)
            k, v = self._random(2, tokens, kv_heads, size)
            k_cache, v_cache = self._random(2, blocks, PAGE, kv_heads, size)
            table = self._random(CONTEXT, size)
            positions = torch.randint(0, CONTEXT, (tokens,), device=self.device)
            slots = torch.randperm(blocks * PAGE, device=self.device)[:tokens]
            weights = {}
            if shape.family == "qwen3":
                weights = {"q_norm_weight": self._random(size), "k_norm_weight": self._random(size)}
            arguments = (q, k, v, table, table.flip(0), positions, slots, k_cache, v_cache)
            return Inputs(arguments, weights, (q, k_cache, v_cache))

        elements = tokens * (2 * heads + 4 * kv_heads + 2) * size
        flops = 3 * tokens * (heads + kv_heads) * size
        yield self._case("rope_kv_write", "rope", tokens, make, elements, flops)

    def _pages(self, batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self.shape
        each = -(-context // PAGE)
        sizes = (2, batch * each, PAGE, shape.num_kv_heads, shape.head_dim)
        k_cache, v_cache = self._random(*sizes)
        # Pages of a sequence lie scattered, as after a few thousand allocations.
        table = torch.randperm(batch * each, device=self.device).view(batch, each).int()
        return k_cache, v_cache, table

    def attention_varlen(self, tokens: int) -> Iterator[OpCase]:
        shape = self.shape
        length = min(CONTEXT, tokens)
        batch = tokens // length

        def make() -> Inputs:
            k_cache, v_cache, table = self._pages(batch, length)
            starts = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * length
            lengths = torch.full((batch,), length, dtype=torch.int32, device=self.device)
            q = self._random(tokens, shape.num_heads, shape.head_dim)
            arguments = (q, k_cache, v_cache, table, starts, lengths)
            return Inputs(arguments, {"scale": shape.head_dim**-0.5, "max_seqlen_q": length})

        elements = 2 * tokens * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        pairs = batch * length * (length + 1) // 2
        flops = 4 * shape.num_heads * shape.head_dim * pairs
        what = f"prefill {batch}x{length}"
        sdpa = partial(self._sdpa, batch, length, length)
        yield self._case("attention_varlen", what, tokens, make, elements, flops, sdpa)

    def paged_attention_decode(self, tokens: int) -> Iterator[OpCase]:
        shape = self.shape
        context = min(CONTEXT, shape.max_positions)

        def make() -> Inputs:
            k_cache, v_cache, table = self._pages(tokens, context)
            lengths = torch.full((tokens,), context, dtype=torch.int32, device=self.device)
            q = self._random(tokens, shape.num_heads, shape.head_dim)
            arguments = (q, k_cache, v_cache, table, lengths)
            return Inputs(arguments, {"scale": shape.head_dim**-0.5})

        keys = tokens * context
        elements = 2 * (keys * shape.num_kv_heads + tokens * shape.num_heads) * shape.head_dim
        flops = 4 * keys * shape.num_heads * shape.head_dim
        what = f"decode context={context}"
        sdpa = partial(self._sdpa, tokens, 1, context)
        yield self._case("paged_attention_decode", what, tokens, make, elements, flops, sdpa)

    def _streams(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.arange(tokens, device=self.device)
        return rows * 7919 + 1, rows, torch.full_like(rows, CONTEXT)

    def sample_logits(self, tokens: int) -> Iterator[OpCase]:
        vocab = self.shape.vocab_size

        def make() -> Inputs:
            logits = torch.randn(tokens, vocab, device=self.device)
            greedy = torch.zeros(tokens, dtype=torch.bool, device=self.device)
            return Inputs((logits, *self._streams(tokens), greedy))

        flops = 4 * tokens * vocab
        # Logits are fp32 whatever the model's dtype.
        elements = math.ceil(4 * tokens * vocab / self.size)
        yield self._case("sample_logits", "sample", tokens, make, elements, flops)

    def lm_head_sample(self, tokens: int) -> Iterator[OpCase]:
        vocab, width = self.shape.vocab_size, self.shape.hidden_size

        def make() -> Inputs:
            keys, uids, positions = self._streams(tokens)
            streams = {"keys": keys, "uids": uids, "positions": positions}
            streams["temperature"] = torch.ones(tokens, device=self.device)
            return Inputs((self._random(tokens, width), self._weight(vocab, width)), streams)

        elements = vocab * width + tokens * width
        flops = 2 * tokens * vocab * width
        yield self._case("lm_head_sample", "head", tokens, make, elements, flops)

    def decode_advance(self, tokens: int) -> Iterator[OpCase]:
        def make() -> Inputs:
            # Room for more steps than are timed: a row at its last position does less.
            table = torch.randint(0, 4096, (tokens, 256), dtype=torch.int32, device=self.device)
            rows = torch.arange(tokens, device=self.device)
            columns = {
                "input_ids": rows.clone(),
                "positions": torch.full_like(rows, CONTEXT),
                "next_positions": torch.full_like(rows, CONTEXT + 1),
                "slot_mapping": table[:, CONTEXT // PAGE].long() * PAGE,
                "steps": torch.zeros_like(rows),
                "context_lens": torch.full_like(rows, CONTEXT + 1, dtype=torch.int32),
                "ring_tokens": torch.zeros(8, tokens, dtype=torch.int64, device=self.device),
                "ring_logprobs": torch.zeros(8, tokens, device=self.device),
                "ring_raw_logprobs": torch.zeros(8, tokens, device=self.device),
            }
            given = {"block_table": table, "block_size": PAGE}
            given["last_positions"] = torch.full_like(rows, 256 * PAGE - 1)
            sampled = (rows + 1, *torch.randn(2, tokens, device=self.device).unbind())
            return Inputs(sampled, {**columns, **given}, tuple(columns.values()))

        # Integers of 8 and 4 bytes whatever the model's dtype: 132 bytes a row, 10 additions.
        elements = math.ceil(132 * tokens / self.size)
        yield self._case("decode_advance", "advance", tokens, make, elements, 10 * tokens)


# Ops of the decode step and of the prompt step; the others serve both.
DECODE_ONLY = ("paged_attention_decode", "sample_logits", "lm_head_sample", "decode_advance")
PREFILL_ONLY = ("attention_varlen",)


def cases(
    op: str,
    shapes: list[ModelShape],
    dtype: torch.dtype,
    device: str,
    *,
    decode_tokens: tuple[int, ...],
    prefill_tokens: tuple[int, ...],
) -> Iterator[OpCase]:
    """Yield the cases of an op, the most telling first: a time limit may cut the rest."""
    tokens: tuple[int, ...] = ()
    if op not in PREFILL_ONLY:
        tokens += decode_tokens
    if op not in DECODE_ONLY:
        tokens += prefill_tokens
    for shape in shapes:
        builder = Case(shape, dtype, device)
        for count in tokens:
            yield from getattr(builder, op)(count)
