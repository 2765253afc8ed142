"""Make the next decode step's inputs out of the tokens just sampled, without the host.

    input_ids[b] = tokens[b];  positions[b] += 1;  context_lens[b] = positions[b] + 1
    slot_mapping[b] = block_table[b, positions[b] // S] * S + positions[b] % S
    ring[steps[b], b] = tokens[b], logprobs[b], raw_logprobs[b];  steps[b] += 1

Everything stays at its address and no number comes from the host, so a captured decode step can be
replayed any number of times and the host reads the ring once. A row whose slot is -1 is padding and
stays as it is. A row that has run its last position becomes padding: slot -1 and no keys, so that
no later step writes or reads a page that is not the row's.

Each row has a step counter of its own: one counter for all would be read and raised by several
warps at once. A program takes four rows a thread, so that a thread reads 16 bytes at a time.

Source: Zheng et al., "SGLang" (arXiv:2312.07104) for multi-step decoding without the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonhybrid_kernels.dependent_launch import await_predecessor
from tritonhybrid_kernels.launch import (
    LaunchCase,
    NarrowRead,
    check_launchable,
    check_rank,
    check_shape,
    decode_options,
    require,
)
from tritonhybrid_kernels.paged_cache import check_index

# Rows of a program of one warp.
_BLOCK_B: Final = 128


@triton.jit
def _decode_advance_kernel(
    tokens_ptr,  # [B] int64
    logprobs_ptr,  # [B] fp32
    raw_logprobs_ptr,  # [B] fp32
    input_ids_ptr,  # [B] int64
    positions_ptr,  # [B] int64
    next_positions_ptr,  # [B] int64
    slot_mapping_ptr,  # [B] int64
    context_lens_ptr,  # [B] int32
    steps_ptr,  # [B] int64
    last_positions_ptr,  # [B] int64
    block_table_ptr,  # [B, MB] int32
    ring_tokens_ptr,  # [R, B] int64
    ring_logprobs_ptr,  # [R, B] fp32
    ring_raw_logprobs_ptr,  # [R, B] fp32
    rope_rows_ptr,  # [B] int64
    batch,
    ring_size,
    rope_original,
    stride_tb,
    stride_rt,
    stride_rl,
    stride_rr,
    BLOCK_SIZE: tl.constexpr,
    HAS_ROPE_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        await_predecessor()
    offs = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = offs < batch
    slots = tl.load(slot_mapping_ptr + offs, mask=mask, other=-1)
    tokens = tl.load(tokens_ptr + offs, mask=mask)
    logprobs = tl.load(logprobs_ptr + offs, mask=mask)
    raw_logprobs = tl.load(raw_logprobs_ptr + offs, mask=mask)
    positions = tl.load(positions_ptr + offs, mask=mask, other=0)
    last_positions = tl.load(last_positions_ptr + offs, mask=mask, other=0)
    steps = tl.load(steps_ptr + offs, mask=mask, other=0)
    is_live = slots >= 0
    is_kept = is_live & (steps >= 0) & (steps < ring_size)
    tl.store(ring_tokens_ptr + steps * stride_rt + offs, tokens, mask=is_kept)
    tl.store(ring_logprobs_ptr + steps * stride_rl + offs, logprobs, mask=is_kept)
    tl.store(ring_raw_logprobs_ptr + steps * stride_rr + offs, raw_logprobs, mask=is_kept)
    tl.store(steps_ptr + offs, steps + 1, mask=is_live)

    goes_on = is_live & (positions < last_positions)
    ends = is_live & (positions >= last_positions)
    if HAS_ROPE_ROWS:
        rows = tl.load(rope_rows_ptr + offs, mask=mask, other=0)
        changes = (rows == positions) & (positions + 1 >= rope_original)
        rows = rows + 1 + tl.where(changes, rope_original, 0)
        tl.store(rope_rows_ptr + offs, rows, mask=goes_on)
    positions += 1
    entries = offs.to(tl.int64) * stride_tb + positions // BLOCK_SIZE
    blocks = tl.load(block_table_ptr + entries, mask=goes_on, other=0).to(tl.int64)
    slots = tl.where(goes_on, blocks * BLOCK_SIZE + positions % BLOCK_SIZE, -1)
    tl.store(input_ids_ptr + offs, tokens, mask=goes_on)
    tl.store(positions_ptr + offs, positions, mask=goes_on)
    tl.store(next_positions_ptr + offs, positions + 1, mask=goes_on)
    lengths = tl.where(ends, 0, positions + 1)
    tl.store(context_lens_ptr + offs, lengths.to(tl.int32), mask=is_live)
    tl.store(slot_mapping_ptr + offs, slots, mask=is_live)


def decode_advance(
    tokens: Tensor,
    logprobs: Tensor,
    raw_logprobs: Tensor,
    *,
    input_ids: Tensor,
    positions: Tensor,
    next_positions: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    steps: Tensor,
    last_positions: Tensor,
    block_table: Tensor,
    block_size: int,
    ring_tokens: Tensor,
    ring_logprobs: Tensor,
    ring_raw_logprobs: Tensor,
    rope_rows: Tensor | None = None,
    rope_original: int = 0,
) -> None:
    """Advance the inputs of a decode step in place and keep what was sampled.

    Rows of slot -1 stay as they are. A row at its last position has its token kept and becomes
    padding: slot -1 and 0 keys, the rest as it was.

    Args:
        tokens: [B] int64, just sampled.
        logprobs: [B] fp32 of the tokens.
        raw_logprobs: [B] fp32 likewise.
        input_ids: [B] int64, becomes the tokens.
        positions: [B] int64 of the tokens that were run.
        next_positions: [B] int64, becomes each position's successor.
        slot_mapping: [B] int64 slots of those positions, -1 for a padding row.
        context_lens: [B] int32, becomes position + 1.
        steps: [B] int64, where a row's next token goes in the ring; tokens past it are not kept.
        last_positions: [B] int64, the last position for which the row has a page.
        block_table: [B, MB] int32; entries past a row's last position are not read.
        block_size: S, slots a page.
        ring_tokens: [R, B] int64, written at each row's step.
        ring_logprobs: [R, B] fp32 likewise.
        ring_raw_logprobs: [R, B] fp32 likewise.
        rope_rows: [B] int64 rows of a rope table of two parts: `rope_original` rows for positions
            below it, then one for every position. A row of the first part moves to the second
            where the position leaves it. None where rows are positions.
        rope_original: rows of the first part.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride is not as above.
    """
    op = "decode_advance"
    check_rank(op, "tokens", tokens, 1, "[B]")
    batch, device = tokens.shape[0], tokens.device
    for name, column in (
        ("tokens", tokens),
        ("input_ids", input_ids),
        ("positions", positions),
        ("next_positions", next_positions),
        ("slot_mapping", slot_mapping),
        ("steps", steps),
        ("last_positions", last_positions),
        ("rope_rows", rope_rows),
    ):
        if column is not None:
            check_index(op, name, column, batch, torch.int64, device)
    check_index(op, "context_lens", context_lens, batch, torch.int32, device)
    for name, column in (("logprobs", logprobs), ("raw_logprobs", raw_logprobs)):
        check_index(op, name, column, batch, torch.float32, device)
    check_rank(op, "block_table", block_table, 2, "[B, MB]")
    check_shape(op, "block_table", block_table, (batch, block_table.shape[1]))
    check_rank(op, "ring_tokens", ring_tokens, 2, "[R, B]")
    ring_size = ring_tokens.shape[0]
    for name, rows, dtype in (
        ("block_table", block_table, torch.int32),
        ("ring_tokens", ring_tokens, torch.int64),
        ("ring_logprobs", ring_logprobs, torch.float32),
        ("ring_raw_logprobs", ring_raw_logprobs, torch.float32),
    ):
        if name != "block_table":
            check_shape(op, name, rows, (ring_size, batch))
        require(
            rows.dtype == dtype and rows.device == device and rows.stride(1) == 1,
            f"{op}: {name} must have contiguous rows beside the tokens",
            f"{dtype} on {device}",
            f"{rows.dtype} on {rows.device} with strides {rows.stride()}",
            f"Build it with dtype={dtype} on that device.",
        )
    require(
        block_size >= 1,
        f"{op}: a page has slots",
        "block_size >= 1",
        block_size,
        "Pass the cache's.",
    )
    if batch == 0:
        return
    check_launchable(op, device)
    _decode_advance_kernel[(triton.cdiv(batch, _BLOCK_B),)](
        tokens,
        logprobs,
        raw_logprobs,
        input_ids,
        positions,
        next_positions,
        slot_mapping,
        context_lens,
        steps,
        last_positions,
        block_table,
        ring_tokens,
        ring_logprobs,
        ring_raw_logprobs,
        rope_rows,
        batch,
        ring_size,
        rope_original,
        block_table.stride(0),
        ring_tokens.stride(0),
        ring_logprobs.stride(0),
        ring_raw_logprobs.stride(0),
        BLOCK_SIZE=block_size,
        HAS_ROPE_ROWS=rope_rows is not None,
        BLOCK_B=_BLOCK_B,
        num_warps=1,
        **decode_options(device),
    )


def audit_cases(arch: int) -> Iterator[LaunchCase]:
    """Yield the launches the offline audit compiles for an architecture (80 for sm_80)."""
    del arch
    int32, int64, fp32 = torch.int32, torch.int64, torch.float32
    columns = {"tokens_ptr": 64, "logprobs_ptr": 32, "raw_logprobs_ptr": 32, "positions_ptr": 64}
    columns |= {"slot_mapping_ptr": 64, "steps_ptr": 64, "last_positions_ptr": 64}
    table = NarrowRead(32, "one entry of each row of the block table")
    for batch, has_rope_rows in ((256, False), (256, True), (8, False), (1, False)):
        read = {**columns, "rope_rows_ptr": 64} if has_rope_rows else columns
        # Rows are read by the vector where their number is known to be a multiple of 16.
        narrow = {name: NarrowRead(bits, f"a batch of {batch} rows") for name, bits in read.items()}
        yield LaunchCase(
            op="decode_advance",
            label=f"B={batch}{', two rope tables' if has_rope_rows else ''}",
            kernel=_decode_advance_kernel,
            args=(
                *(int64, fp32, fp32, int64, int64, int64, int64, int32, int64, int64, int32),
                *(int64, fp32, fp32, int64 if has_rope_rows else None),
                *(batch, 8, 4096 if has_rope_rows else 0, 128, 256, 256, 256),
            ),
            constants={
                "BLOCK_SIZE": 64,
                "HAS_ROPE_ROWS": has_rope_rows,
                "BLOCK_B": _BLOCK_B,
                "PDL": False,
            },
            options={"num_warps": 1},
            mma="none",
            streams=tuple(read) if batch % 16 == 0 else (),
            narrow={"block_table_ptr": table, **({} if batch % 16 == 0 else narrow)},
        )


def decode_advance_ref(
    tokens: Tensor,
    logprobs: Tensor,
    raw_logprobs: Tensor,
    *,
    input_ids: Tensor,
    positions: Tensor,
    next_positions: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    steps: Tensor,
    last_positions: Tensor,
    block_table: Tensor,
    block_size: int,
    ring_tokens: Tensor,
    ring_logprobs: Tensor,
    ring_raw_logprobs: Tensor,
    rope_rows: Tensor | None = None,
    rope_original: int = 0,
) -> None:
    """Do in torch what :func:`decode_advance` does, without a host read either."""
    is_live = slot_mapping >= 0
    goes_on = is_live & (positions < last_positions)
    if ring_tokens.shape[0]:
        is_kept = is_live & (steps >= 0) & (steps < ring_tokens.shape[0])
        place = steps.clamp(0, ring_tokens.shape[0] - 1).unsqueeze(0)
        for ring, values in (
            (ring_tokens, tokens),
            (ring_logprobs, logprobs),
            (ring_raw_logprobs, raw_logprobs),
        ):
            kept = torch.where(is_kept.unsqueeze(0), values.unsqueeze(0), ring.gather(0, place))
            ring.scatter_(0, place, kept)
    steps.add_(is_live)
    if rope_rows is not None:
        changes = (rope_rows == positions) & (positions + 1 >= rope_original)
        rope_rows.add_(goes_on * (1 + changes * rope_original))
    positions.add_(goes_on)
    input_ids.copy_(torch.where(goes_on, tokens, input_ids))
    next_positions.copy_(torch.where(goes_on, positions + 1, next_positions))
    context_lens.copy_(torch.where(is_live, torch.where(goes_on, positions + 1, 0), context_lens))
    page = torch.where(goes_on, positions // block_size, 0).unsqueeze(1)
    blocks = block_table.gather(1, page).squeeze(1).long()
    slots = torch.where(goes_on, blocks * block_size + positions % block_size, -1)
    slot_mapping.copy_(torch.where(is_live, slots, slot_mapping))
