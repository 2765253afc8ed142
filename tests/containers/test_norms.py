"""A norm's weight is read raw only where the module is shown to compute the norm described."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_zoo import build
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tritonhybrid.containers.norm import is_rms_norm
from tritonhybrid.testing import check_family

EPS = 1e-6


class Doubled(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class SquaredRMSNorm(LlamaRMSNorm):
    """Llama's where the weight is one, as in every model before its first step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * super().forward(x)


class ClampedRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-100, 100))


class BiasedRMSNorm(LlamaRMSNorm):
    """Llama's where the bias is zero."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias


class NoEpsilonRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-12).rsqrt()


class RaisingRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on a GPU only")


class Rescale(nn.Module):
    """An RMS norm under another name, written in another way."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = (x.float().pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return (x.float() / norm * self.weight.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "offset"),
    [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0), (Rescale, 0.0), (nn.RMSNorm, 0.0)],
)
def test_a_module_that_computes_the_formula_is_an_rms_norm(kind: Any, offset: float, dtype: Any):
    norm = kind(24, EPS).to(dtype)
    parameters = dict(norm.named_parameters())
    assert is_rms_norm(norm, EPS, offset)
    assert not is_rms_norm(norm, EPS, 1.0 - offset)
    assert not is_rms_norm(norm, 10 * EPS, offset)
    assert dict(norm.named_parameters()) == parameters


@pytest.mark.parametrize(
    "kind",
    [Doubled, SquaredRMSNorm, ClampedRMSNorm, BiasedRMSNorm, NoEpsilonRMSNorm, RaisingRMSNorm],
)
def test_a_module_that_agrees_only_here_and_now_is_none(kind: Any):
    assert not is_rms_norm(kind(24, EPS), EPS, 0.0)


def test_a_layer_norm_is_none():
    assert not is_rms_norm(nn.LayerNorm(24, EPS, bias=False), EPS, 0.0)


@pytest.mark.parametrize("kind", [Doubled, SquaredRMSNorm])
@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.k_norm"])
def test_a_norm_of_another_formula_sends_its_layer_to_generic(name: str, kind: Any):
    model = build("qwen3")
    norm = model.get_submodule(f"model.layers.1.{name}")
    norm.__class__ = kind
    nn.init.ones_(norm.weight)
    report = check_family(model, max_new_tokens=8, path="generic")
    reason = f"{name} is a {kind.__name__} that is not the RMS norm described"
    assert report.layer_paths == {
        "fused: Qwen3DecoderLayer is described": 1,
        f"generic: {reason}": 1,
    }
    assert report.notes == (f"layer 1: {reason}",)


def test_a_norm_of_another_name_is_fused():
    model = build("llama")
    for layer in model.model.layers:
        layer.input_layernorm = Rescale(32, EPS)
    check_family(model, max_new_tokens=8, path="fused")


@pytest.mark.parametrize("kind", [Doubled, SquaredRMSNorm])
def test_a_final_norm_of_another_formula_is_called(kind: Any):
    model = build("llama")
    model.model.norm.__class__ = kind
    nn.init.ones_(model.model.norm.weight)
    check_family(model, max_new_tokens=8, path="fused")
    nn.init.uniform_(model.model.norm.weight)
    check_family(model, max_new_tokens=8, path="fused")
