"""Rules that a model's code has and no description names: the probe notices them in bf16 too.

At the scores and logits of two tiny prompts each changes less than bf16 rounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_zoo import build
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from tritonhybrid import SamplingParams
from tritonhybrid.testing import hold

PROMPTS = [[5, 6, 7, 8, 9], [10] * 20, [11, 12]]
GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)
DTYPES = [torch.float32, torch.bfloat16]


def rolled(model: Any) -> Any:
    """A rollout's stats and notes, its tokens held against Hugging Face's own."""
    out = hold(model).rollout(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, out.completions, strict=True):
        ids = torch.tensor([prompt])
        own = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert completion.token_ids == own[0, len(prompt) :].tolist()
    return out.stats


class AlteredHead(LlamaForCausalLM):
    """Does something of its own to the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.alter(out.logits)
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda z: 30 * torch.tanh(z / 30), id="cap of 30"),
        pytest.param(lambda z: 50 * torch.tanh(z / 50), id="cap of 50"),
        pytest.param(lambda z: z * 0.95, id="scale of 0.95"),
        pytest.param(lambda z: z.clamp(-90, 90), id="clamp at 90"),
    ],
)
def test_what_a_model_does_to_its_logits_goes_to_hugging_faces_loop(dtype: Any, alter: Any):
    model = build("llama").to(dtype)
    model.__class__ = type("Altered", (AlteredHead,), {"alter": staticmethod(alter)})
    stats = rolled(model)
    assert stats.path == "hf"
    assert any("the head's logits differ from HF's by" in note for note in stats.notes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_that_goes_around_its_backbone_is_seen_through_too(dtype: Any):
    model = build("opt").to(dtype)
    assert hold(model).rollout(PROMPTS, GREEDY).stats.path == "generic"
    base = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.forward(self, *args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    model.__class__ = type("Altered", (base,), {"forward": forward})
    stats = rolled(model)
    assert stats.path == "hf"
    assert any("the head's logits differ from HF's by" in note for note in stats.notes)


def capped_attention(base: type[nn.Module], cap: float) -> type[nn.Module]:
    """An attention class that caps its scores and calls no attention of the library's."""

    class Capped(base):  # type: ignore[misc, valid-type]
        def forward(
            self, hidden_states: Any, position_embeddings: Any, attention_mask: Any, **kwargs: Any
        ) -> Any:
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (
                projection(hidden_states).view(shape)
                for projection in (self.q_proj, self.k_proj, self.v_proj)
            )
            if hasattr(self, "q_norm"):
                q, k = self.q_norm(q), self.k_norm(k)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            past = kwargs.get("cache", kwargs.get("past_key_values"))
            if past is not None:
                k, v = past.update(k, v, self.layer_idx)
            group = self.num_key_value_groups
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
            scores = q @ k.transpose(2, 3) * self.scaling
            scores = cap * torch.tanh(scores / cap)
            seen = torch.ones(scores.shape[-2:]).tril(k.shape[2] - q.shape[2]).bool()
            weights = scores.masked_fill(~seen, float("-inf")).float().softmax(-1).to(v.dtype)
            out = (weights @ v).transpose(1, 2).flatten(2)
            return self.o_proj(out), weights

    return Capped


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("cap", [30.0, 50.0])
@pytest.mark.parametrize(("name", "base"), [("llama", LlamaAttention), ("qwen3", Qwen3Attention)])
def test_a_cap_on_the_scores_is_noticed(name: str, base: Any, cap: float, dtype: Any):
    model = build(name).to(dtype)
    model.model.layers[1].self_attn.__class__ = capped_attention(base, cap)
    stats = rolled(model)
    assert stats.path == "hf"
    assert any("layer 1: fused differs from HF" in note for note in stats.notes)
    assert not any("layer 0" in note for note in stats.notes)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma"])
def test_what_rounding_explains_is_not_noticed(
    name: str, head_dim: int, attention: str, dtype: Any
):
    model = build(name, head_dim=head_dim).to(dtype)
    model.set_attn_implementation(attention)
    stats = hold(model).rollout(PROMPTS, GREEDY).stats
    assert (stats.path, stats.notes) == ("fused", [])


def test_lifted_scores_leave_nothing_behind():
    model = build("qwen3")
    before = {
        name: (dict(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    weights = {name: p.clone() for name, p in model.named_parameters()}
    hold(model).rollout(PROMPTS, GREEDY)
    for name, module in model.named_modules():
        attributes, hooks, pre_hooks = before[name]
        assert module.__dict__.keys() == attributes.keys()
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == (hooks, pre_hooks)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_the_attention_of_the_tests_is_the_librarys_but_for_the_cap():
    model = build("llama")
    attention = model.model.layers[1].self_attn
    x = torch.randn(1, 9, 32)
    rope = model.model.rotary_emb(x, torch.arange(9).unsqueeze(0))
    model.set_attn_implementation("sdpa")
    expected, _ = attention(x, position_embeddings=rope, attention_mask=None)
    attention.__class__ = capped_attention(LlamaAttention, 1e6)
    capped, _ = attention(x, position_embeddings=rope, attention_mask=None)
    torch.testing.assert_close(capped, expected, rtol=1e-4, atol=1e-5)
