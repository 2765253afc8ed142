"""attention_varlen against fp64: packed prompts, cached prefixes, groups, windows, foreign keys."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels.attention_config import AttentionConfig
from tritonhybrid_kernels.attention_varlen import attention_varlen, attention_varlen_ref
from tritonhybrid_kernels.errors import KernelArgumentError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (attention_varlen, attention_varlen_ref)
# Small tiles walk through many blocks of few tokens, which the interpreter can afford.
SMALL = AttentionConfig(16, 16, 4, 2)


def packed(device, dtype, shapes, num_heads, num_kv_heads, head_dim, block_size):
    """Queries and caches of sequences (num_queries, num_keys), NaN wherever no key is."""
    counts = [-(-num_keys // block_size) for _, num_keys in shapes]
    num_blocks = sum(counts) + 2
    order = torch.randperm(num_blocks).tolist()
    caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), float("nan"))
    table = torch.full((len(shapes), max([*counts, 1]) + 1), 2**30, dtype=torch.int32)
    for row, ((_, num_keys), count) in enumerate(zip(shapes, counts, strict=True)):
        for index in range(count):
            block = order.pop()
            table[row, index] = block
            used = min(block_size, num_keys - index * block_size)
            caches[:, block, :used] = torch.randn(2, used, num_kv_heads, head_dim)
    k_cache, v_cache = caches.to(device, dtype)
    num_queries = torch.tensor([0, *(shape[0] for shape in shapes)])
    cu_seqlens = num_queries.cumsum(0).to(device, torch.int32)
    q = torch.randn(int(num_queries.sum()), num_heads, head_dim).to(device, dtype)
    context_lens = torch.tensor([shape[1] for shape in shapes], dtype=torch.int32, device=device)
    return q, k_cache, v_cache, table.to(device), cu_seqlens, context_lens


def exact(q, k_cache, v_cache, table, cu_seqlens, context_lens, scale, window=None, softcap=None):
    """Attention in fp64, one sequence at a time, by a full matrix of scores."""
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for row, num_keys in enumerate(context_lens.tolist()):
        begin, end = cu_seqlens[row : row + 2].tolist()
        if begin == end or num_keys == 0:
            continue
        blocks = table[row, : -(-num_keys // block_size)].long()
        keys = k_cache[blocks].flatten(0, 1)[:num_keys].double().repeat_interleave(group, 1)
        values = v_cache[blocks].flatten(0, 1)[:num_keys].double().repeat_interleave(group, 1)
        scores = torch.einsum("ihe,jhe->hij", q[begin:end].double(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(num_keys - (end - begin), num_keys, device=q.device)[:, None]
        j = torch.arange(num_keys, device=q.device)[None, :]
        hidden = j > i if window is None else (j > i) | (i - j >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
        out[begin:end] = torch.einsum("hij,jhe->ihe", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_and_prefixes_match_fp64(device, dtype, attend, assert_accurate, poisoned):
    shapes = [(17, 17), (1, 16), (0, 5), (1, 1), (15, 15), (5, 70), (16, 32)]
    operands = packed(device, dtype, shapes, 4, 2, 64, 16)
    out = poisoned(*operands[0].shape, dtype=dtype, device=device)
    result = attend(*operands, scale=0.125, out=out)
    assert result is out
    assert_accurate(out, exact(*operands, 0.125))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_small_tiles_match_fp64(device, dtype, assert_accurate):
    shapes = [(40, 40), (3, 50), (0, 0), (33, 40), (1, 17)]
    operands = packed(device, dtype, shapes, 2, 1, 32, 16)
    result = attention_varlen(*operands, scale=0.2, config=SMALL)
    assert_accurate(result, exact(*operands, 0.2))


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 8])
def test_every_group_size(device, group, attend, assert_accurate):
    operands = packed(device, torch.float32, [(9, 9), (7, 20)], 2 * group, 2, 32, 8)
    assert_accurate(attend(*operands, scale=0.2), exact(*operands, 0.2))


def test_a_group_wider_than_the_tile_gets_a_wider_tile(device, assert_accurate):
    operands = packed(device, torch.float32, [(2, 3), (1, 9)], 71, 1, 16, 8)
    assert_accurate(attention_varlen(*operands, scale=0.2), exact(*operands, 0.2))


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_size(device, head_dim, attend, assert_accurate):
    operands = packed(device, torch.bfloat16, [(20, 20), (3, 65)], 2, 1, head_dim, 32)
    scale = head_dim**-0.5
    assert_accurate(attend(*operands, scale=scale), exact(*operands, scale))


@pytest.mark.parametrize("block_size", [8, 16, 24, 64])
def test_blocks_smaller_and_larger_than_a_tile(device, block_size, assert_accurate):
    operands = packed(device, torch.float32, [(30, 64), (10, 41)], 2, 1, 32, block_size)
    assert_accurate(attention_varlen(*operands, scale=0.2, config=SMALL), exact(*operands, 0.2))


@pytest.mark.parametrize("window", [1, 7, 16, 33, 500])
def test_a_window_hides_older_keys(device, window, assert_accurate):
    operands = packed(device, torch.float32, [(40, 40), (20, 90), (1, 60)], 2, 1, 32, 16)
    expected = exact(*operands, 0.2, window=window)
    assert_accurate(attention_varlen(*operands, scale=0.2, window=window, config=SMALL), expected)
    assert_accurate(attention_varlen_ref(*operands, scale=0.2, window=window), expected)


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_bends_the_scores(device, softcap, attend, assert_accurate):
    operands = packed(device, torch.float32, [(20, 20), (5, 33)], 2, 1, 32, 16)
    result = attend(*operands, scale=0.2, softcap=softcap)
    assert_accurate(result, exact(*operands, 0.2, softcap=softcap))


@pytest.mark.parametrize("max_seqlen_q", [1, 16, 64])
def test_the_longest_query_run_only_chooses_tiles(device, max_seqlen_q, assert_accurate):
    operands = packed(device, torch.bfloat16, [(1, 30), (1, 9)], 2, 1, 64, 16)
    result = attention_varlen(*operands, scale=0.2, max_seqlen_q=max_seqlen_q)
    assert_accurate(result, exact(*operands, 0.2))


@pytest.mark.parametrize("attend", PATHS)
def test_huge_scores_stay_finite(device, attend, assert_accurate):
    q, *rest = packed(device, torch.float16, [(20, 20)], 2, 1, 64, 16)
    q = q * 60
    assert_accurate(attend(q, *rest, scale=1.0), exact(q, *rest, 1.0))


@pytest.mark.parametrize("attend", PATHS)
def test_queries_of_a_sequence_without_keys_give_zeros(device, attend, poisoned):
    operands = packed(device, torch.float32, [(2, 0), (3, 3)], 2, 1, 32, 16)
    out = poisoned(5, 2, 32, dtype=torch.float32, device=device)
    attend(*operands, scale=0.2, out=out)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert not out[2:].isnan().any()


def test_the_torch_path_knows_sinks_and_alibi(device):
    operands = packed(device, torch.float32, [(6, 6), (3, 20)], 2, 1, 32, 16)
    q, k_cache, v_cache, table = operands[:4]
    sinks, slopes = torch.randn(2, device=device), torch.rand(2, device=device)
    result = attention_varlen_ref(*operands, scale=0.1, sinks=sinks, alibi_slopes=slopes)
    for row, (begin, num_queries, num_keys) in enumerate([(0, 6, 6), (6, 3, 20)]):
        blocks = table[row, : -(-num_keys // 16)].long()
        keys = k_cache[blocks].flatten(0, 1)[:num_keys, 0].double()
        values = v_cache[blocks].flatten(0, 1)[:num_keys, 0].double()
        for index in range(num_queries):
            visible = num_keys - num_queries + index + 1
            scores = q[begin + index].double() @ keys[:visible].t() * 0.1
            distance = torch.arange(visible - 1, -1, -1, device=device)
            scores -= slopes.double()[:, None] * distance
            weights = torch.cat((scores, sinks.double()[:, None]), 1).softmax(-1)[:, :visible]
            expected = weights @ values[:visible]
            torch.testing.assert_close(
                result[begin + index].double(), expected, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(device, dtype):
    shapes = [(21, 21), (5, 40), (33, 50)]
    q, k_cache, v_cache, table, cu_seqlens, context_lens = packed(
        device, dtype, shapes, 2, 1, 32, 16
    )
    caches = (k_cache, v_cache)
    batch = attention_varlen(q, *caches, table, cu_seqlens, context_lens, scale=0.2, config=SMALL)
    for row in range(len(shapes)):
        begin, end = cu_seqlens[row : row + 2].tolist()
        alone = attention_varlen(
            q[begin:end],
            *caches,
            table[row : row + 1],
            torch.tensor([0, end - begin], dtype=torch.int32, device=device),
            context_lens[row : row + 1],
            scale=0.2,
            config=SMALL,
        )
        assert torch.equal(alone, batch[begin:end])


def test_a_prefix_from_the_cache_gives_the_bits_of_the_whole_prompt(device):
    q, k_cache, v_cache, table, _, context_lens = packed(
        device, torch.float32, [(50, 50)], 2, 1, 32, 16
    )

    def attend(first):
        cu_seqlens = torch.tensor([0, 50 - first], dtype=torch.int32, device=device)
        return attention_varlen(
            q[first:], k_cache, v_cache, table, cu_seqlens, context_lens, scale=0.2, config=SMALL
        )

    whole = attend(0)
    for first in (16, 33):
        assert torch.equal(attend(first), whole[first:])


def test_no_tokens_give_no_rows(device):
    for attend in PATHS:
        for shapes in ([], [(0, 0), (0, 7)]):
            operands = packed(device, torch.float32, shapes, 2, 1, 32, 16)
            assert attend(*operands, scale=1.0).shape == (0, 2, 32)


def test_bad_arguments_are_named(device):
    operands = packed(device, torch.float32, [(4, 4)], 4, 2, 32, 16)
    q, k_cache, v_cache, table, cu_seqlens, context_lens = operands
    rest = (table, cu_seqlens, context_lens)
    with pytest.raises(KernelArgumentError, match="cu_seqlens_q has the wrong shape"):
        attention_varlen(q, k_cache, v_cache, table, cu_seqlens[:1], context_lens, scale=1.0)
    with pytest.raises(KernelArgumentError, match="q must have 3 dimensions"):
        attention_varlen(q[0], k_cache, v_cache, *rest, scale=1.0)
    with pytest.raises(KernelArgumentError, match="k_cache has the wrong shape"):
        attention_varlen(q, k_cache[..., :16], v_cache, *rest, scale=1.0)
    with pytest.raises(KernelArgumentError, match="v_cache has the wrong shape"):
        attention_varlen(q, k_cache, v_cache[:1], *rest, scale=1.0)
    with pytest.raises(KernelArgumentError, match="heads of q must follow each other"):
        attention_varlen(q.expand(4, 4, 32)[:, ::2], k_cache, v_cache, *rest, scale=1.0)
    with pytest.raises(KernelArgumentError, match="heads of out must follow each other"):
        out = torch.empty(4, 8, 32, device=device)[:, ::2]
        attention_varlen(q, k_cache, v_cache, *rest, scale=1.0, out=out)
    with pytest.raises(KernelArgumentError, match="alibi_slopes has no Triton kernel"):
        attention_varlen(*operands, scale=1.0, alibi_slopes=torch.ones(4, device=device))
