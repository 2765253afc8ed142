"""Philox: known answers, the uniform's range, the same bits in torch and in the kernel."""

from __future__ import annotations

import struct

import pytest
import torch
import triton
import triton.language as tl

from tritonhybrid_kernels.philox import (
    gumbel,
    gumbel_from_uniform,
    philox_uniform,
    philox_uniform_ref,
)

WORD = 0xFFFFFFFF


def philox_word(key, counter):
    """First word of Philox-4x32-10 in Python integers."""
    k0, k1 = key & WORD, key >> 32 & WORD
    c0, c1, c2, c3 = counter
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            product1 >> 32 ^ c1 ^ k0,
            product1 & WORD,
            product0 >> 32 ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0


def fp32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def uniform_of(word):
    return fp32(fp32(fp32(min(word, WORD - 128)) + 0.5) * 2.0**-32)


def test_the_generator_gives_the_known_answers_of_its_authors():
    # Random123's kat_vectors, philox4x32 10.
    assert philox_word(0, (0, 0, 0, 0)) == 0x6627E8D5
    assert philox_word(-1, (WORD, WORD, WORD, WORD)) == 0x408F276D
    key = 0xA4093822 | 0x299F31D0 << 32
    assert philox_word(key, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)) == 0xD16CFE09


def random_counters(count):
    counters = torch.randint(0, 2**32, (4, count))
    counters[:, :2] = torch.tensor([0, WORD])
    keys = torch.randint(-(2**63), 2**63 - 1, (count,))
    keys[:3] = torch.tensor([0, -1, -(2**63)])
    return keys, counters


def test_torch_computes_the_uniforms_of_python_integers(device):
    keys, counters = random_counters(50)
    result = philox_uniform_ref(keys.to(device), *counters.to(device)).tolist()
    words = [philox_word(k, c) for k, c in zip(keys.tolist(), counters.t().tolist(), strict=True)]
    assert result == [uniform_of(word) for word in words]


def test_counters_are_words_and_broadcast(device):
    keys = torch.tensor([3, 2**40], device=device)
    ids = torch.arange(5, device=device)
    block = philox_uniform_ref(keys[:, None], ids, 7, keys[:, None] >> 32, 2**32 + 1)
    assert block.shape == (2, 5) and block.dtype == torch.float32
    for row in range(2):
        for column in range(5):
            key = keys[row : row + 1]
            single = philox_uniform_ref(key, ids[column : column + 1], 7, key >> 32, 1)
            assert torch.equal(single, block[row, column : column + 1])


def test_extreme_words_stay_inside_the_interval():
    assert uniform_of(0) == 2.0**-33
    assert uniform_of(WORD) == uniform_of(WORD - 128) == 1 - 2.0**-24


@triton.jit
def _uniform_kernel(
    keys_ptr, c0_ptr, c1_ptr, c2_ptr, c3_ptr, uniform_ptr, gumbel_ptr, SIZE: tl.constexpr
):
    offs = tl.arange(0, SIZE)
    uniform = philox_uniform(
        tl.load(keys_ptr + offs),
        tl.load(c0_ptr + offs),
        tl.load(c1_ptr + offs),
        tl.load(c2_ptr + offs),
        tl.load(c3_ptr + offs),
    )
    tl.store(uniform_ptr + offs, uniform)
    tl.store(gumbel_ptr + offs, gumbel(uniform))


def test_the_kernel_draws_the_bits_of_the_torch_path(device):
    keys, counters = random_counters(1024)
    keys, counters = keys.to(device), counters.to(device)
    uniform, noise = torch.full((2, 1024), float("nan"), device=device)
    _uniform_kernel[(1,)](keys, *counters, uniform, noise, SIZE=1024)
    assert torch.equal(uniform, philox_uniform_ref(keys, *counters))
    torch.testing.assert_close(noise, gumbel_from_uniform(uniform), rtol=2e-6, atol=2e-6)


@triton.jit
def _gumbel_kernel(uniform_ptr, noise_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(noise_ptr + offs, gumbel(tl.load(uniform_ptr + offs)))


def test_gumbel_noise_is_accurate_where_the_uniform_is_tiny(device):
    exponents = torch.arange(-33.0, 0.0, device=device)
    uniform = torch.cat((torch.exp2(exponents), 1 - torch.exp2(exponents[9:]))).float()
    uniform = torch.nn.functional.pad(uniform, (0, 64 - uniform.numel()), value=0.5)
    exact = -torch.log(-torch.log1p(-uniform.double()))
    noise = torch.full((64,), float("nan"), device=device)
    _gumbel_kernel[(1,)](uniform, noise, SIZE=64)
    torch.testing.assert_close(noise.double(), exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gumbel_from_uniform(uniform).double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("word", [0, 1, 2, 3])
def test_every_counter_word_spreads_uniforms_evenly(device, word):
    counters = [torch.full((20000,), 5, device=device) for _ in range(4)]
    counters[word] = torch.arange(20000, device=device)
    uniform = philox_uniform_ref(torch.full((20000,), 11, device=device), *counters)
    counts = torch.histc(uniform.cpu(), 100, 0, 1)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    # 99 degrees of freedom: 99 +- 14; six deviations.
    assert 15 < chi_square < 184
