"""lm_head_sample against fp64: logprobs, the distribution, greedy rows, ragged vocabularies."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.lm_head_sample import lm_head_sample, lm_head_sample_ref
from tritonhybrid_kernels.philox import philox_uniform_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (lm_head_sample, lm_head_sample_ref)
# Absolute error of a logprob: half a step of the rounded logits, which reach about 8.
LOGPROB_TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def head(device, dtype, batch, vocab_size, depth):
    hidden = torch.randn(batch, depth).to(device, dtype)
    weight = (2 * torch.randn(vocab_size, depth) / depth**0.5).to(device, dtype)
    return hidden, weight


def draws(device, batch, temperature):
    index = torch.arange(batch, device=device)
    return {
        "temperature": torch.full((batch,), temperature, device=device),
        "keys": index * 2654435761 - 2**40,
        "uids": index + 2**35,
        "positions": index % 5 + 7,
    }


def exact_logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    """Logits in fp64, rounded to the dtype of `hidden` where HF's lm_head rounds them."""
    logits = hidden.double() @ weight.double().t()
    logits = logits if bias is None else logits + bias.double()
    logits = logits.to(hidden.dtype).double() * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def noise(vocab_size, keys, uids, positions, **_):
    """Gumbel noise in fp64 from the uniforms of each token id."""
    uniform = philox_uniform_ref(
        keys[:, None],
        torch.arange(vocab_size, device=keys.device),
        positions[:, None],
        uids[:, None],
        uids[:, None] >> 32,
    )
    return -torch.log(-torch.log1p(-uniform.double()))


def check(result, logits, temperature, tolerance, gumbel=None):
    """Check logprobs in fp64, and that each token's noisy score is the best but for rounding."""
    tokens, logprobs, raw_logprobs = result
    assert tokens.dtype == torch.int64
    divisor = torch.where(temperature > 0, temperature, 1.0).double()[:, None]
    raw = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    scaled = (logits / divisor).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(raw_logprobs.double(), raw, rtol=0, atol=tolerance)
    scaled_tolerance = tolerance / min(1.0, float(divisor.min()))
    torch.testing.assert_close(logprobs.double(), scaled, rtol=0, atol=scaled_tolerance)
    scores = logits / divisor
    if gumbel is not None:
        scores = scores + torch.where(temperature[:, None] > 0, gumbel, 0.0)
    chosen = scores.gather(1, tokens[:, None])[:, 0]
    assert (chosen >= scores.amax(-1) - 2 * scaled_tolerance).all()


@pytest.mark.parametrize("sample", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "vocab_size", "depth"), [(1, 130, 64), (17, 257, 72)])
def test_samples_and_logprobs_match_fp64(device, dtype, batch, vocab_size, depth, sample):
    hidden, weight = head(device, dtype, batch, vocab_size, depth)
    options = draws(device, batch, 0.7)
    options["temperature"][::3] = 0.0
    options["temperature"][1::3] = 1.5
    result = sample(hidden, weight, **options)
    logits = exact_logits(hidden, weight)
    gumbel = noise(vocab_size, **options)
    check(result, logits, options["temperature"], LOGPROB_TOLERANCES[dtype], gumbel)


@pytest.fixture
def poisoned_memory():
    """What torch.empty gives is full of NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("vocab_size", [130, 300])
def test_what_the_padding_of_the_tiles_holds_is_not_looked_at(device, vocab_size, poisoned_memory):
    assert torch.empty(1, device=device).isnan()
    hidden, weight = head(device, torch.float32, 3, vocab_size, 48)
    options = draws(device, 3, 0.8)
    options["temperature"][1] = 0.0
    result = lm_head_sample(hidden, weight, **options)
    logits = exact_logits(hidden, weight)
    check(result, logits, options["temperature"], 1e-5, noise(vocab_size, **options))


@pytest.mark.parametrize("sample", PATHS)
def test_bias_scale_and_softcap_shape_the_logits(device, sample):
    hidden, weight = head(device, torch.float32, 3, 140, 48)
    bias = torch.randn(140, device=device)
    options = draws(device, 3, 0.8)
    for changes in (
        {},
        {"logit_scale": 0.25},
        {"softcap": 3.0},
        {"logit_scale": 4.0, "softcap": 5.0},
    ):
        result = sample(hidden, weight, bias, **options, **changes)
        logits = exact_logits(hidden, weight, bias, **changes)
        check(result, logits, options["temperature"], 1e-5, noise(140, **options))


@pytest.mark.parametrize("sample", PATHS)
def test_greedy_rows_take_the_lowest_of_the_largest(device, sample):
    hidden = torch.eye(4, 16, device=device)
    weight = torch.randn(300, 16, device=device)
    weight[[299, 130, 7], 0] = 9.0
    weight[[299, 128], 1] = 9.0
    weight[299, 2] = 9.0
    options = draws(device, 4, 0.0)
    tokens, logprobs, raw_logprobs = sample(hidden, weight, **options)
    assert tokens.tolist() == [7, 128, 299, int(weight[:, 3].argmax())]
    assert torch.equal(logprobs, raw_logprobs)


@pytest.mark.parametrize("sample", PATHS)
def test_samples_follow_the_softmax(device, sample):
    batch = 640 if sample is lm_head_sample and device.type == "cpu" else 20000
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0, 1.5], device=device)
    hidden = torch.zeros(batch, 16, device=device)
    hidden[:, 0] = 1.0
    weight = torch.zeros(6, 16, device=device)
    weight[:, 0] = logits
    tokens, _, _ = sample(hidden, weight, **draws(device, batch, 2.0))
    counts = torch.bincount(tokens.cpu(), minlength=6)
    expected = (logits.cpu().double() / 2).softmax(-1) * batch
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 5 degrees of freedom: p = 1e-4 at 25.7.
    assert chi_square < 25.7


@pytest.mark.parametrize("sample", PATHS)
def test_tokens_masked_by_the_bias_are_never_picked(device, sample):
    hidden, weight = head(device, torch.float32, 8, 300, 32)
    bias = torch.full((300,), float("-inf"), device=device)
    bias[[3, 290]] = 0.0
    tokens, logprobs, raw_logprobs = sample(hidden, weight, bias, **draws(device, 8, 1.0))
    assert set(tokens.tolist()) <= {3, 290}
    expected = exact_logits(hidden, weight, bias).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(raw_logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs, raw_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample", PATHS)
def test_huge_logits_stay_finite(device, sample):
    hidden, weight = head(device, torch.float32, 3, 140, 32)
    hidden = hidden * 1e4
    tokens, logprobs, raw_logprobs = sample(hidden, weight, **draws(device, 3, 1.0))
    assert torch.equal(tokens, exact_logits(hidden, weight).argmax(-1))
    assert logprobs.isfinite().all() and raw_logprobs.isfinite().all()


def test_a_row_has_the_same_token_alone_and_in_any_batch(device):
    hidden, weight = head(device, torch.bfloat16, 6, 300, 64)
    options = draws(device, 6, 1.0)
    result = lm_head_sample(hidden, weight, **options)
    order = torch.tensor([3, 1, 5, 0, 4, 2], device=device)
    shuffled = lm_head_sample(hidden[order], weight, **{k: v[order] for k, v in options.items()})
    alone = lm_head_sample(hidden[2:3], weight, **{k: v[2:3] for k, v in options.items()})
    for whole, part, single in zip(result, shuffled, alone, strict=True):
        assert torch.equal(part, whole[order])
        assert torch.equal(single, whole[2:3])


def test_more_rows_than_a_program_takes(device):
    hidden, weight = head(device, torch.float32, 70, 40, 16)
    options = draws(device, 70, 1.0)
    result = lm_head_sample(hidden, weight, **options)
    check(result, exact_logits(hidden, weight), options["temperature"], 1e-5, noise(40, **options))


def test_both_paths_pick_the_same_tokens(device):
    hidden, weight = head(device, torch.float32, 16, 700, 64)
    options = draws(device, 16, 1.0)
    result, expected = (path(hidden, weight, **options) for path in PATHS)
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], rtol=1e-5, atol=1e-5)


def test_padded_rows_and_weights_are_read_in_place(device):
    hidden, weight = head(device, torch.float32, 3, 50, 64)
    options = draws(device, 3, 1.0)
    view = lm_head_sample(hidden[:, :33], weight[:, :33], **options)
    copy = lm_head_sample(hidden[:, :33].clone(), weight[:, :33].clone(), **options)
    for left, right in zip(view, copy, strict=True):
        assert torch.equal(left, right)


def test_no_rows_give_no_tokens(device):
    hidden, weight = head(device, torch.float32, 0, 50, 16)
    for values in lm_head_sample(hidden, weight, **draws(device, 0, 1.0)):
        assert values.shape == (0,)


def test_bad_arguments_are_named(device):
    hidden, weight = head(device, torch.float32, 2, 50, 16)
    options = draws(device, 2, 1.0)
    with pytest.raises(KernelArgumentError, match="weight has the wrong shape"):
        lm_head_sample(hidden, weight[:, :8], **options)
    with pytest.raises(KernelArgumentError, match="one dtype"):
        lm_head_sample(hidden, weight.half(), **options)
    with pytest.raises(KernelArgumentError, match="bias has the wrong shape"):
        lm_head_sample(hidden, weight, weight[0], **options)
    with pytest.raises(KernelArgumentError, match="there must be tokens"):
        lm_head_sample(hidden, weight[:0], **options)
    with pytest.raises(KernelArgumentError, match="softcap must be positive"):
        lm_head_sample(hidden, weight, **options, softcap=-1.0)
    with pytest.raises(KernelArgumentError, match="temperature must be contiguous"):
        lm_head_sample(hidden, weight, **{**options, "temperature": options["keys"]})
    with pytest.raises(KernelArgumentError, match="keys has the wrong shape"):
        lm_head_sample(hidden, weight, **{**options, "keys": options["keys"][:1]})
