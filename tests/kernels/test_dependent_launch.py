"""Dependent launch: off under the interpreter, and on a device without a trace in any bit."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels import launch
from tritonhybrid_kernels.ops import select_ops


def test_only_a_device_that_has_it_launches_dependents(device, monkeypatch):
    monkeypatch.setattr(launch, "DEPENDENT_LAUNCH", True)
    assert launch.decode_options(torch.device("cpu")) == {"PDL": False}
    has_it = device.type == "cuda" and launch.device_arch(device) >= 90
    assert launch.decode_options(device)["PDL"] is has_it
    assert launch.decode_options(device).get("launch_pdl", False) is has_it


def decode(device, num_steps, hidden=1024, vocab_size=32000):
    """Steps of a two-layer model of random weights; returns all that its kernels wrote."""
    ops = select_ops("triton")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, device=device) * shape[-1] ** -0.5
        return values.bfloat16()

    batch, heads, kv_heads, head_dim, block_size = 5, 8, 2, 128, 64
    norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
    projections = [(heads * head_dim, hidden), *[(kv_heads * head_dim, hidden)] * 2]
    layers = [
        {
            "qkv": [normal(*shape) for shape in projections],
            "o": normal(hidden, heads * head_dim),
            "gate_up": [normal(4 * hidden, hidden) for _ in range(2)],
            "down": normal(hidden, 4 * hidden),
            "cache": torch.zeros(
                2, batch * 2, block_size, kv_heads, head_dim, device=device, dtype=torch.bfloat16
            ),
        }
        for _ in range(2)
    ]
    embedding = normal(vocab_size, hidden)
    angles = normal(2 * block_size, head_dim // 2).float().repeat(1, 2)
    tables = torch.arange(batch * 2, dtype=torch.int32, device=device).view(batch, 2)
    rows = torch.arange(batch, device=device)
    tokens, written = rows, []
    for step in range(num_steps):
        position = torch.full_like(rows, step)
        lengths = torch.full((batch,), step + 1, dtype=torch.int32, device=device)
        residual, x = embedding[tokens].clone(), None
        for layer in layers:
            x = ops.add_rms_norm(residual, norm, 1e-6)
            q, k, v = (
                part.unflatten(1, (-1, head_dim)) for part in ops.qkv_linear(x, *layer["qkv"])
            )
            slots = tables[:, step // block_size].long() * block_size + step % block_size
            ops.rope_kv_write(
                *(q, k, v, angles.cos().bfloat16(), angles.sin().bfloat16(), position, slots),
                *layer["cache"],
            )
            attended = ops.paged_attention_decode(
                q, *layer["cache"], tables, lengths, scale=head_dim**-0.5, num_splits=2
            )
            ops.linear(attended.flatten(1), layer["o"], residual=residual, out=residual)
            x = ops.add_rms_norm(residual, norm, 1e-6)
            x = ops.gate_up_silu(x, *layer["gate_up"])
            ops.linear(x, layer["down"], residual=residual, out=residual)
        tokens, *logprobs = ops.lm_head_sample(
            ops.add_rms_norm(residual, norm, 1e-6),
            embedding,
            temperature=torch.ones(batch, device=device),
            keys=rows,
            uids=rows,
            positions=position,
        )
        written += [residual, tokens, *logprobs]
    return [*written, *(layer["cache"] for layer in layers)]


@pytest.mark.gpu
def test_dependent_launches_change_no_bit_of_a_decode(device, monkeypatch):
    expected = decode(device, 100)
    monkeypatch.setattr(launch, "DEPENDENT_LAUNCH", True)
    for _ in range(5):
        results = decode(device, 100)
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
