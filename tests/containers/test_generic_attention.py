"""What a layer tells its attention function is done, or known to change nothing, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_zoo import build
from hf_reference import hf_alone, prompts

from tritonhybrid import SamplingParams, generation
from tritonhybrid.containers.probe import probe
from tritonhybrid.testing import check_family, hold

PROMPTS = prompts(3, 9)


def telling(**said: Any) -> Any:
    """A model on the generic path whose layers say more to the attention function."""
    model = build("olmo")
    attention_class = type(model.model.layers[0].self_attn)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return attention_class.forward(self, *args, **{**kwargs, **said})

    for layer in model.model.layers:
        layer.self_attn.__class__ = type("Telling", (attention_class,), {"forward": forward})
    return model


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"is_causal": True, "output_attentions": False},
        {"num_items_in_batch": torch.tensor(3), "output_router_logits": True},
        {"position_bias": None, "sinks": None},
    ],
    ids=lambda said: "+".join(said) or "nothing",
)
def test_what_changes_nothing_is_served_on_the_generic_path(said: dict[str, Any]):
    report = check_family(telling(**said), max_new_tokens=6, path="generic")
    assert report.notes == ()


@pytest.mark.parametrize(
    "said",
    [
        {"position_bias": torch.zeros(1, 1, 1, 1)},
        {"sinks": torch.zeros(4)},
        {"indices": torch.zeros(1, dtype=torch.int64)},
        {"is_causal": False},
        {"a_rule_of_tomorrow": 1},
    ],
    ids=lambda said: next(iter(said)),
)
def test_what_is_not_known_sends_the_model_to_hugging_faces_loop(said: dict[str, Any]):
    model = telling(**said)
    out = hold(model).rollout(PROMPTS, SamplingParams(max_new_tokens=6, temperature=0.0))
    assert [c.token_ids for c in out.completions] == [hf_alone(model, p, 6) for p in PROMPTS]
    assert out.stats.path == "hf"
    (note,) = out.stats.notes
    assert "Attention over pages does what it knows and no more" in note
    assert f"got {next(iter(said))} from Telling" in note


def test_a_refusal_is_asked_for_once(monkeypatch: pytest.MonkeyPatch):
    probed: list[Any] = []

    def counting(*args: Any) -> Any:
        probed.append(probe(*args))
        return probed[-1]

    monkeypatch.setattr(generation, "probe", counting)
    engine = hold(telling(sinks=torch.zeros(4)))
    params = SamplingParams(max_new_tokens=2)
    paths = [engine.rollout(PROMPTS, params).stats.path for _ in range(3)]
    assert paths == ["hf"] * 3
    assert [verdict.is_native for verdict in probed] == [False]
