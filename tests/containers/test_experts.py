"""Eager experts, which read the host, run as graph-legal ones inside a rollout, or it is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_zoo import build
from hf_reference import hf_alone, prompts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tritonhybrid import SamplingParams
from tritonhybrid.containers.experts import GRAPH_LEGAL_EXPERTS
from tritonhybrid.recording import Recorder
from tritonhybrid.testing import check_family, hold

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
PROMPTS = prompts(3, 9, 21)
GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)
EAGER = "a decode step reads the host: eager experts"


def eager(name: str) -> Any:
    model = build(name)
    model.set_experts_implementation("eager")
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the graph-legal experts."""
    counted: list[int] = []
    original = ALL_EXPERTS_FUNCTIONS[GRAPH_LEGAL_EXPERTS]

    def count(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(hidden_states.shape[0])
        return original(module, hidden_states, *args, **kwargs)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, GRAPH_LEGAL_EXPERTS, count)
    return counted


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_experts_give_hugging_faces_tokens_by_the_graph_legal_ones(
    name: str, calls: list[int]
):
    model = eager(name)
    expected = [hf_alone(model, prompt, 8) for prompt in PROMPTS]
    assert calls == []
    engine = hold(model)
    out = engine.rollout(PROMPTS, GREEDY)
    assert [c.token_ids for c in out.completions] == expected
    assert out.stats.path == "generic" and out.stats.notes == []
    assert all(
        path.endswith(f"; experts by {GRAPH_LEGAL_EXPERTS}, not eager")
        for path in out.stats.layer_paths
    )
    # In the probe and in the rollout: prompts packed, then a token of each sequence.
    assert {9, 2, 33, 3} <= set(calls)
    assert model.config._experts_implementation == "eager"
    calls.clear()
    assert [hf_alone(model, prompt, 8) for prompt in PROMPTS] == expected
    assert calls == []
    check_family(model, path="generic", max_new_tokens=8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decode_step_of_eager_experts_reads_nothing_on_the_host(name: str):
    engine, recorder = hold(eager(name)), Recorder()
    with recorder.watch(engine):
        engine.rollout(PROMPTS, GREEDY)
    assert len(recorder.steps) == 7
    assert [step.host_reads for step in recorder.steps] == [[]] * 7


@pytest.mark.parametrize("kind", ["raises", "differs"])
def test_where_the_graph_legal_experts_fail_the_eager_ones_run_and_it_is_said(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    model = eager("mixtral")
    original = ALL_EXPERTS_FUNCTIONS[GRAPH_LEGAL_EXPERTS]

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kind == "raises":
            raise RuntimeError("strides are not multiples of 16 bytes")
        return original(*args, **kwargs) * 1.1

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, GRAPH_LEGAL_EXPERTS, failing)
    engine, recorder = hold(model), Recorder()
    with recorder.watch(engine):
        engine.rollout(PROMPTS, GREEDY)
    assert all("aten::nonzero" in step.host_reads for step in recorder.steps)
    report = check_family(model, path="generic", max_new_tokens=8)
    assert report.layer_paths == {
        f"generic: eager experts: those by {GRAPH_LEGAL_EXPERTS} failed": 2
    }
    assert report.notes[-1] == EAGER
    assert ("multiples of 16" if kind == "raises" else "differ from HF's") in report.notes[0]
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_what_the_user_chose_among_the_graph_legal_ones_stays(implementation: str):
    model = build("mixtral")
    model.set_experts_implementation(implementation)
    report = check_family(model, path="generic", max_new_tokens=8)
    assert report.notes == ()
    assert not any("experts by" in path for path in report.layer_paths)
    assert model.config._experts_implementation == implementation
