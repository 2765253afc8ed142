"""sample_logits against fp64: the inverse CDF, the distribution, masked tokens, ties, logprobs."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.philox import philox_uniform_ref
from tritonhybrid_kernels.sample_logits import sample_logits, sample_logits_ref

PATHS = (sample_logits, sample_logits_ref)
ROW_COUNTER = 2**32 - 1


def rows(device, batch, first=0):
    """Keys, uids and positions of distinct rows, with high words in use."""
    index = torch.arange(first, first + batch, device=device)
    return index * 2654435761 - 2**40, index + 2**35, index % 7 + 100


def never(device, batch):
    return torch.zeros(batch, dtype=torch.bool, device=device)


@pytest.mark.parametrize("sample", PATHS)
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 2047, 2048, 2049, 5003])
def test_tokens_invert_the_cdf_at_the_rows_uniform(device, vocab_size, sample):
    batch = 6
    logits = torch.randn(batch, vocab_size, device=device) * 4
    keys, uids, positions = rows(device, batch)
    tokens, logprobs = sample(logits, keys, uids, positions, never(device, batch))
    uniform = philox_uniform_ref(keys, ROW_COUNTER, positions, uids, uids >> 32).double()
    logprob = logits.double().log_softmax(-1)
    cdf = logprob.exp().cumsum(-1).gather(1, tokens[:, None])[:, 0]
    exact = logprob.gather(1, tokens[:, None])[:, 0]
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert (uniform <= cdf + 1e-6).all()
    assert (uniform >= cdf - exact.exp() - 1e-6).all()
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("sample", PATHS)
def test_samples_follow_the_softmax(device, sample):
    logits = torch.tensor([2.0, 0.5, float("-inf"), 1.0, -1.0, 0.0, 1.5], device=device)
    # The interpreter takes a row at a time.
    batch = 300 if sample is sample_logits and device.type == "cpu" else 20000
    tokens, _ = sample(logits.expand(batch, 7), *rows(device, batch), never(device, batch))
    counts = torch.bincount(tokens.cpu(), minlength=7)
    assert counts[2] == 0
    expected = logits.cpu().double().softmax(-1) * batch
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # 5 degrees of freedom: p = 1e-4 at 25.7.
    assert chi_square < 25.7


@pytest.mark.parametrize("sample", PATHS)
def test_a_token_of_probability_zero_is_never_picked(device, sample):
    batch, vocab_size = 16, 2500
    logits = torch.full((batch, vocab_size), float("-inf"), device=device)
    # One or two finite tokens a row, at the ends, across tiles, or too small to have mass.
    places = torch.randint(0, vocab_size, (batch, 2), device=device)
    places[0] = 0
    places[1] = vocab_size - 1
    logits.scatter_(1, places, torch.randn(batch, 2, device=device))
    logits[2, :] = -1000.0
    logits[2, 77] = 0.0
    tokens, logprobs = sample(logits, *rows(device, batch), never(device, batch))
    assert (logits.softmax(-1).gather(1, tokens[:, None]) > 0).all()
    assert logprobs.isfinite().all()
    assert tokens[:3].tolist() == [0, vocab_size - 1, 77]


@pytest.mark.parametrize("sample", PATHS)
def test_uniforms_at_the_edges_pick_the_ends_of_the_support(device, sample):
    # Keys whose uniforms are the smallest and largest of a million.
    candidates = torch.arange(1_000_000, device=device)
    uniform = philox_uniform_ref(candidates, ROW_COUNTER, 0, 0, 0)
    keys = torch.stack((uniform.argmin(), uniform.argmax()))
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    logits = torch.full((2, 3000), float("-inf"), device=device)
    logits[:, 5:2990] = 0.0
    tokens, _ = sample(logits, keys, zeros, zeros, never(device, 2))
    assert tokens.tolist() == [5, 2989]


@pytest.mark.parametrize("sample", PATHS)
def test_greedy_rows_take_the_lowest_of_the_largest(device, sample):
    logits = torch.randn(4, 4100, device=device)
    logits[0, [4000, 3, 2050]] = 9.0
    logits[1, [4099, 2048]] = 9.0
    logits[2, 4099] = 9.0
    greedy = torch.tensor([True, True, True, False], device=device)
    tokens, logprobs = sample(logits, *rows(device, 4), greedy)
    assert tokens[:3].tolist() == [3, 2048, 4099]
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("sample", PATHS)
def test_huge_logits_stay_finite(device, sample):
    logits = torch.randn(8, 300, device=device) * 1e4 + 1e5
    tokens, logprobs = sample(logits, *rows(device, 8), never(device, 8))
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-2)
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("sample", PATHS)
def test_a_row_has_the_same_token_alone_and_in_any_batch(device, sample):
    logits = torch.randn(6, 2300, device=device) * 3
    draws = rows(device, 6)
    tokens, logprobs = sample(logits, *draws, never(device, 6))
    order = torch.tensor([3, 1, 5, 0, 4, 2], device=device)
    shuffled = sample(logits[order], *(d[order] for d in draws), never(device, 6))
    assert torch.equal(shuffled[0], tokens[order]) and torch.equal(shuffled[1], logprobs[order])
    for row in range(6):
        part = slice(row, row + 1)
        alone = sample(logits[part], *(d[part].clone() for d in draws), never(device, 1))
        assert torch.equal(alone[0], tokens[part]) and torch.equal(alone[1], logprobs[part])


def test_both_paths_pick_the_same_tokens(device):
    logits = torch.randn(12, 3001, device=device) * 2
    draws = (*rows(device, 12), torch.arange(12, device=device) % 5 == 0)
    tokens, logprobs = sample_logits(logits, *draws)
    expected_tokens, expected_logprobs = sample_logits_ref(logits, *draws)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample", PATHS)
def test_position_and_uid_change_the_draw(device, sample):
    logits = torch.zeros(4, 5000, device=device)
    key = torch.full((4,), 9, device=device)
    uids = torch.tensor([0, 0, 1, 2**32], device=device)
    positions = torch.tensor([0, 1, 0, 0], device=device)
    tokens, _ = sample(logits, key, uids, positions, never(device, 4))
    assert len(set(tokens.tolist())) == 4


@pytest.mark.parametrize("sample", PATHS)
def test_rows_may_be_a_view_of_a_padded_vocabulary(device, sample):
    wide = torch.randn(3, 300, device=device)
    draws = (*rows(device, 3), never(device, 3))
    view, copy = sample(wide[:, :201], *draws), sample(wide[:, :201].clone(), *draws)
    assert torch.equal(view[0], copy[0]) and torch.equal(view[1], copy[1])


def test_no_rows_give_no_tokens(device):
    tokens, logprobs = sample_logits(
        torch.zeros(0, 10, device=device), *rows(device, 0), never(device, 0)
    )
    assert tokens.shape == (0,) and logprobs.shape == (0,)


def test_bad_arguments_are_named(device):
    logits = torch.zeros(2, 10, device=device)
    keys, uids, positions = rows(device, 2)
    greedy = never(device, 2)
    with pytest.raises(KernelArgumentError, match="logits must be float32"):
        sample_logits(logits.half(), keys, uids, positions, greedy)
    with pytest.raises(KernelArgumentError, match="logits must be contiguous"):
        sample_logits(logits.t().contiguous().t(), keys, uids, positions, greedy)
    with pytest.raises(KernelArgumentError, match="uids has the wrong shape"):
        sample_logits(logits, keys, uids[:1], positions, greedy)
    with pytest.raises(KernelArgumentError, match="greedy must be contiguous"):
        sample_logits(logits, keys, uids, positions, greedy.long())
