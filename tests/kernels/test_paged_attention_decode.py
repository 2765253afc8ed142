"""paged_attention_decode against fp64: lengths, groups, head sizes, splits, foreign memory."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.key_splits import num_splits_for, workspace_size
from tritonhybrid_kernels.paged_attention_decode import (
    paged_attention_decode,
    paged_attention_decode_ref,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (paged_attention_decode, paged_attention_decode_ref)


def paged(device, dtype, lengths, num_kv_heads, head_dim, block_size, max_blocks=None):
    """Caches with NaN wherever no sequence has a key, shuffled blocks, garbage table tails."""
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks).tolist()
    caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), float("nan"))
    max_blocks = max_blocks or max([*counts, 1]) + 2
    table = torch.full((len(lengths), max_blocks), 2**30, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for index in range(count):
            block = order.pop()
            table[row, index] = block
            used = min(block_size, length - index * block_size)
            caches[:, block, :used] = torch.randn(2, used, num_kv_heads, head_dim)
    k_cache, v_cache = caches.to(device, dtype)
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return k_cache, v_cache, table.to(device), context_lens


def exact(q, k_cache, v_cache, table, lengths, scale, window=None, softcap=None, rows=None):
    """Attention of each row in fp64, key by key out of the pages."""
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        if length == 0:
            continue
        places = [(int(table[row, j // block_size]), j % block_size) for j in range(first, length)]
        blocks, slots = (list(column) for column in zip(*places, strict=True))
        keys = k_cache[blocks, slots].cpu().double().repeat_interleave(group, 1)
        values = v_cache[blocks, slots].cpu().double().repeat_interleave(group, 1)
        scores = torch.einsum("he,jhe->hj", q[row].cpu().double(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[row] = torch.einsum("hj,jhe->he", scores.softmax(-1), values)
    return out.to(q.device)


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_a_block_match_fp64(device, dtype, attend, assert_accurate, poisoned):
    lengths = [0, 1, 15, 16, 17, 80]
    k_cache, v_cache, table, context_lens = paged(device, dtype, lengths, 1, 64, 16)
    q = torch.randn(len(lengths), 4, 64, device=device).to(dtype)
    out = poisoned(*q.shape, dtype=dtype, device=device)
    result = attend(q, k_cache, v_cache, table, context_lens, scale=0.125, out=out)
    assert result is out
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert_accurate(out, exact(q, k_cache, v_cache, table, lengths, 0.125))


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 8])
def test_every_group_size(device, group, attend, assert_accurate):
    lengths = [33, 70]
    k_cache, v_cache, table, context_lens = paged(device, torch.float32, lengths, 2, 64, 64)
    q = torch.randn(2, 2 * group, 64, device=device)
    result = attend(q, k_cache, v_cache, table, context_lens, scale=0.125)
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, 0.125))


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_size(device, dtype, head_dim, attend, assert_accurate):
    lengths = [65]
    k_cache, v_cache, table, context_lens = paged(device, dtype, lengths, 1, head_dim, 32)
    q = torch.randn(1, 2, head_dim, device=device).to(dtype)
    result = attend(q, k_cache, v_cache, table, context_lens, scale=head_dim**-0.5)
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, head_dim**-0.5))


@pytest.mark.parametrize("block_size", [8, 48, 64, 256])
@pytest.mark.parametrize("num_splits", [1, 2, 3, 20])
def test_blocks_of_any_size_under_any_split(device, block_size, num_splits, assert_accurate):
    lengths = [300, 0, 1, 64, 65]
    k_cache, v_cache, table, context_lens = paged(
        device, torch.bfloat16, lengths, 1, 64, block_size
    )
    q = torch.randn(len(lengths), 2, 64, device=device, dtype=torch.bfloat16)
    size = workspace_size(len(lengths), 2, 64, num_splits)
    workspace = torch.full((size,), float("nan"), device=device)
    result = paged_attention_decode(
        q,
        k_cache,
        v_cache,
        table,
        context_lens,
        scale=0.125,
        num_splits=num_splits,
        workspace=workspace,
    )
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, 0.125))
    assert torch.equal(result[1], torch.zeros_like(result[1]))


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("window", [1, 16, 40, 1000])
def test_a_window_hides_older_keys(device, window, attend, assert_accurate):
    lengths = [100, 3, 41, 0]
    k_cache, v_cache, table, context_lens = paged(device, torch.float32, lengths, 1, 64, 16)
    q = torch.randn(len(lengths), 2, 64, device=device)
    result = attend(q, k_cache, v_cache, table, context_lens, scale=0.2, window=window)
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, 0.2, window=window))


@pytest.mark.parametrize("attend", PATHS)
def test_a_window_of_equal_lengths(device, attend, assert_accurate):
    lengths = [50, 50]
    k_cache, v_cache, table, context_lens = paged(device, torch.float32, lengths, 1, 64, 16)
    q = torch.randn(2, 2, 64, device=device)
    result = attend(q, k_cache, v_cache, table, context_lens, scale=0.2, window=20)
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, 0.2, window=20))


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_bends_the_scores(device, softcap, attend, assert_accurate):
    lengths = [37, 5]
    k_cache, v_cache, table, context_lens = paged(device, torch.float32, lengths, 2, 64, 16)
    q = torch.randn(2, 4, 64, device=device)
    result = attend(q, k_cache, v_cache, table, context_lens, scale=0.125, softcap=softcap)
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, 0.125, softcap=softcap))


def test_the_torch_path_knows_sinks_and_alibi(device):
    lengths = [9, 30]
    k_cache, v_cache, table, context_lens = paged(device, torch.float32, lengths, 2, 64, 16)
    q = torch.randn(2, 2, 64, device=device)
    sinks, slopes = torch.randn(2, device=device), torch.rand(2, device=device)
    result = paged_attention_decode_ref(
        q, k_cache, v_cache, table, context_lens, scale=0.1, sinks=sinks, alibi_slopes=slopes
    )
    for row, length in enumerate(lengths):
        keys = k_cache[table[row, : -(-length // 16)].long()].flatten(0, 1)[:length].double()
        values = v_cache[table[row, : -(-length // 16)].long()].flatten(0, 1)[:length].double()
        scores = torch.einsum("he,jhe->hj", q[row].double(), keys) * 0.1
        distance = torch.arange(length - 1, -1, -1, device=device)
        scores -= slopes.double()[:, None] * distance
        weights = torch.cat((scores, sinks.double()[:, None]), 1).softmax(-1)[:, :length]
        expected = torch.einsum("hj,jhe->he", weights, values)
        torch.testing.assert_close(result[row].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", PATHS)
def test_huge_scores_stay_finite(device, attend, assert_accurate):
    lengths = [70, 17]
    k_cache, v_cache, table, context_lens = paged(device, torch.float16, lengths, 1, 64, 16)
    q = torch.randn(2, 2, 64, device=device).to(torch.float16) * 60
    result = attend(q, k_cache, v_cache, table, context_lens, scale=1.0)
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, 1.0))


@pytest.mark.parametrize("attend", PATHS)
def test_rows_may_share_blocks(device, attend, assert_accurate):
    k_cache, v_cache, table, _ = paged(device, torch.float32, [40], 1, 64, 16)
    table = table.expand(3, -1).contiguous()
    lengths = [40, 32, 7]
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    q = torch.randn(3, 2, 64, device=device)
    result = attend(q, k_cache, v_cache, table, context_lens, scale=0.125)
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, 0.125))


@pytest.mark.parametrize("attend", PATHS)
def test_views_of_a_fused_projection_and_of_a_joint_cache_are_read_in_place(
    device, attend, assert_accurate
):
    lengths = [20, 33]
    k_cache, v_cache, table, context_lens = paged(device, torch.float32, lengths, 2, 64, 16)
    joint = torch.stack((k_cache, v_cache), 1)
    fused = torch.randn(2, 8, 64, device=device)
    q = fused[:, :4]
    result = attend(q, joint[:, 0], joint[:, 1], table, context_lens, scale=0.125)
    assert_accurate(result, exact(q, k_cache, v_cache, table, lengths, 0.125))


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(device, num_splits, dtype):
    lengths = [130, 7, 200, 65]
    k_cache, v_cache, table, context_lens = paged(device, dtype, lengths, 1, 64, 64)
    q = torch.randn(4, 4, 64, device=device).to(dtype)

    def attend(rows):
        return paged_attention_decode(
            q[rows],
            k_cache,
            v_cache,
            table[rows],
            context_lens[rows],
            scale=0.1,
            num_splits=num_splits,
        )

    batch = attend([0, 1, 2, 3])
    assert torch.equal(attend([2, 0, 3, 1]), batch[[2, 0, 3, 1]])
    for row in (1, 2):
        assert torch.equal(attend([row]), batch[[row]])


def test_no_sequences_give_no_rows(device):
    k_cache, v_cache, table, context_lens = paged(device, torch.float32, [5], 1, 64, 16)
    q = torch.randn(0, 2, 64, device=device)
    for attend in PATHS:
        result = attend(q, k_cache, v_cache, table[:0], context_lens[:0], scale=1.0)
        assert result.shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "max_keys", "expected"),
    [(1, 8, 131072, 33), (1, 8, 256, 4), (32, 8, 4096, 2), (512, 8, 4096, 1), (1, 1, 0, 1)],
)
def test_splits_fill_the_device_and_hold_a_tile_at_least(batch, num_kv_heads, max_keys, expected):
    assert num_splits_for(batch, num_kv_heads, max_keys, 64) == expected


def test_bad_arguments_are_named(device):
    k_cache, v_cache, table, context_lens = paged(device, torch.float32, [5, 6], 2, 64, 16)
    q = torch.randn(2, 4, 64, device=device)

    def attend(q=q, k_cache=k_cache, table=table, context_lens=context_lens, **options):
        return paged_attention_decode(
            q, k_cache, v_cache, table, context_lens, scale=1.0, **options
        )

    with pytest.raises(KernelArgumentError, match="block_table must be int32"):
        attend(table=table.long())
    with pytest.raises(KernelArgumentError, match="as many query heads"):
        attend(q=q[:, :3])
    with pytest.raises(KernelArgumentError, match="context_lens must be contiguous"):
        attend(context_lens=context_lens.long())
    with pytest.raises(KernelArgumentError, match="k_cache must be contiguous"):
        attend(k_cache=k_cache.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(KernelArgumentError, match="one dtype"):
        attend(q=q.half())
    with pytest.raises(KernelArgumentError, match="the workspace must hold"):
        attend(num_splits=2, workspace=torch.empty(7, device=device))
    with pytest.raises(KernelArgumentError, match="one range at least"):
        attend(num_splits=0)
    with pytest.raises(KernelArgumentError, match="sinks has no Triton kernel"):
        attend(sinks=torch.zeros(4, device=device))
    with pytest.raises(KernelArgumentError, match="softcap must be positive"):
        attend(softcap=0.0)
    with pytest.raises(KernelArgumentError, match="a window holds"):
        attend(window=0)
