"""What a user does to a model's modules is served too, on the path that can; nothing stays behind.

``check_family`` compares with Hugging Face's results of the very same, altered model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from family_zoo import build
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import tritonhybrid
from tritonhybrid import ConfigError, NonFiniteLogitsError, SamplingParams
from tritonhybrid.containers import description
from tritonhybrid.containers.description import LayerDescription, describe_from_structure
from tritonhybrid.testing import check_family, hold

GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)
PROMPTS = [[5, 6, 7, 8, 9], [10] * 20, [11, 12]]


def scale_output(factor: float) -> Any:
    return lambda module, args, out: out * factor


def attributes(model: nn.Module) -> dict[tuple[int, str], Any]:
    """Every instance attribute of every module and configuration, by identity."""
    owners: list[Any] = [*model.modules(), model.config, model.generation_config]
    found = {}
    for owner in owners:
        for name, value in owner.__dict__.items():
            found[id(owner), name] = id(value)
            if isinstance(value, dict):
                found.update({(id(value), str(key)): id(v) for key, v in value.items()})
    return found


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.0",
        "model.layers.1.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ],
)
def test_a_hook_inside_a_layer_sends_that_layer_to_generic_and_runs(path: str):
    model = build("llama")

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0] * 1.3, *out[1:]) if isinstance(out, tuple) else out * 1.3

    model.get_submodule(path).register_forward_hook(hook)
    report = check_family(model, max_new_tokens=8, path="generic")
    assert sum(n for reason, n in report.layer_paths.items() if "fused" in reason[:6]) == 1
    assert sum(n for reason, n in report.layer_paths.items() if "has a hook" in reason) == 1


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_a_hook_on_a_projection_runs_inside_the_fused_layer(name: str):
    model = build("llama")
    seen = []
    projection = model.get_submodule(f"model.layers.1.{name}")
    projection.register_forward_hook(scale_output(1.3))
    projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    check_family(model, max_new_tokens=8, path="fused")
    assert set(seen) == {projection.in_features}


@pytest.mark.parametrize("name", ["norm", "rotary_emb", "embed_tokens"])
def test_a_hook_around_the_layers_runs(name: str):
    model = build("llama")

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return tuple(x * 0.9 for x in out) if isinstance(out, tuple) else out * 0.9

    model.model.get_submodule(name).register_forward_hook(hook)
    check_family(model, max_new_tokens=8, path="fused")


def test_a_hook_on_the_head_runs():
    model = build("llama")
    model.lm_head.register_forward_hook(scale_output(0.5))
    check_family(model, max_new_tokens=8, path="fused")


def test_a_hook_on_the_model_goes_to_hugging_faces_loop_also_when_it_comes_later():
    model = build("llama")
    engine = hold(model)
    assert engine.rollout(PROMPTS, GREEDY).stats.path == "fused"

    def favour_token_9(module: nn.Module, args: Any, out: Any) -> Any:
        out.logits[..., 9] += 100
        return out

    handle = model.register_forward_hook(favour_token_9)
    out = engine.rollout(PROMPTS, GREEDY)
    assert out.stats.path == "hf"
    assert [c.token_ids for c in out.completions] == [[9] * 6] * 3
    handle.remove()
    assert engine.rollout(PROMPTS, GREEDY).stats.path == "fused"


def test_hooks_that_hugging_face_leaves_after_recording_hidden_states_do_not_count():
    model = build("llama")
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    check_family(model, max_new_tokens=8, path="fused")
    with torch.no_grad():
        seen = model(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    assert len(seen.hidden_states) == 3


def test_a_parametrised_weight_is_computed_by_its_module():
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = build("llama")
    parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", Doubled())
    check_family(model, max_new_tokens=8, path="fused")


def test_a_parametrised_norm_sends_its_layer_to_generic():
    class Shifted(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + 0.5

    model = build("llama")
    parametrize.register_parametrization(model.model.layers[0].input_layernorm, "weight", Shifted())
    check_family(model, max_new_tokens=8, path="generic")


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"])
def test_a_subclass_of_linear_is_called_as_the_module_it_is(name: str):
    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    model = build("llama")
    model.get_submodule(f"model.layers.0.{name}").__class__ = Halved
    check_family(model, max_new_tokens=8, path="fused")


def test_a_forward_of_the_users_own_on_a_layer_is_called():
    model = build("llama")
    layer = model.model.layers[1]
    theirs = type(layer).forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return theirs(layer, hidden_states * 1.1, *args, **kwargs)

    layer.forward = forward
    check_family(model, max_new_tokens=8, path="generic")
    assert layer.forward is forward


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_a_rollout_leaves_no_attribute_behind(name: str):
    model = build(name)
    engine = hold(model)
    # What HF itself leaves (rotary buffers, a warning given) is there after the first call.
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0)
    before = attributes(model)
    engine.rollout(PROMPTS, GREEDY)
    assert attributes(model) == before


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_rollout_that_raises_leaves_no_attribute_behind(name: str):
    model = build(name)
    engine = hold(model)
    engine.rollout(PROMPTS, GREEDY)
    before = attributes(model)
    with torch.no_grad():
        kept = model.model.embed_tokens.weight[11].clone()
        model.model.embed_tokens.weight[11] = float("nan")
    with pytest.raises(NonFiniteLogitsError):
        engine.rollout(PROMPTS, GREEDY)
    assert attributes(model) == before
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = kept
    check_family(model, max_new_tokens=4)


def test_layers_whose_rotary_module_is_not_found_are_served_by_their_own_code():
    model = build("llama")

    class Hidden(type(model.model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__["rotary_emb"] = self.turn
            try:
                return super().forward(*args, **kwargs)
            finally:
                del self.__dict__["rotary_emb"]

    model.model.turn = model.model._modules.pop("rotary_emb")
    model.model.__class__ = Hidden
    report = check_family(model, max_new_tokens=8, path="generic")
    assert list(report.layer_paths) == [
        "generic: the model has no rotary module that its layers share"
    ]


def toy_layer(name: str) -> type[nn.Module]:
    """A decoder layer class with a name of its own, built and computed like Llama's."""
    return type(name, (LlamaDecoderLayer,), {"__module__": __name__})


def toy_model(layer_class: type[nn.Module]) -> Any:
    model = build("llama")
    for layer in model.model.layers:
        layer.__class__ = layer_class
    return model


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "_POLICIES", dict(description._POLICIES))


@pytest.mark.parametrize(
    "mistake",
    [
        {"scale": 0.5},
        {"num_heads": 2, "head_dim": 16, "num_kv_heads": 1},
        {"window": 2},
        {"activation": "gelu"},
        {"norm_eps": 0.1},
        {"norm_weight_offset": 1.0},
        {"gate_proj": "mlp.up_proj", "up_proj": "mlp.gate_proj"},
        {"q_proj": "self_attn.nowhere"},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
@pytest.mark.usefixtures("policies")
def test_a_wrong_policy_is_demoted_by_the_probe(mistake: dict[str, Any]):
    layer_class = toy_layer("WrongLayer")
    tritonhybrid.register_policy(
        f"{__name__}.WrongLayer",
        lambda layer: replace(describe_from_structure(layer), **mistake),
    )
    report = check_family(toy_model(layer_class), max_new_tokens=6, path="generic")
    assert sum(report.layer_paths.values()) == 2


@pytest.mark.usefixtures("policies")
def test_a_policy_from_outside_serves_its_family():
    class RenamedLayer(LlamaDecoderLayer):
        """Llama's layer with norms of other names, which no structure rule knows."""

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            x = hidden_states
            x = x + self.self_attn(hidden_states=self.ln_attention(x), **kwargs)[0]
            return x + self.mlp(self.ln_mlp(x))

    def renamed() -> Any:
        model = build("llama")
        for layer in model.model.layers:
            layer.ln_attention = layer._modules.pop("input_layernorm")
            layer.ln_mlp = layer._modules.pop("post_attention_layernorm")
            layer.__class__ = RenamedLayer
        return model

    def policy(layer: nn.Module) -> LayerDescription:
        return LayerDescription(
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            scale=8**-0.5,
            norm_eps=layer.ln_mlp.variance_epsilon,
            input_norm="ln_attention",
            post_attention_norm="ln_mlp",
        )

    check_family(renamed(), max_new_tokens=8, path="generic")
    name = f"{__name__}.{RenamedLayer.__qualname__}"
    tritonhybrid.register_policy(name, policy)
    check_family(renamed(), max_new_tokens=8, path="fused")


@pytest.mark.usefixtures("policies")
def test_a_second_policy_for_a_class_is_refused():
    tritonhybrid.register_policy("somewhere.Layer", describe_from_structure)
    with pytest.raises(ConfigError, match=r"one policy: .* got somewhere\.Layer"):
        tritonhybrid.register_policy("somewhere.Layer", describe_from_structure)
    taken = "transformers.models.llama.modeling_llama.LlamaDecoderLayer"
    with pytest.raises(ConfigError, match="one policy"):
        tritonhybrid.register_policy(taken, describe_from_structure)
