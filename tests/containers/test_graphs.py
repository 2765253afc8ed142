"""Every family of the fused path may be captured; the others say why not."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_zoo import FAMILIES, build
from hf_reference import hf_alone, prompts

from tritonhybrid import SamplingParams
from tritonhybrid.recording import Recorder, StepRecord, graph_violations

GREEDY = SamplingParams(max_new_tokens=7, temperature=0.0)
RAGGED = prompts(3, 17, 30)
FUSED = [name for name, family in FAMILIES.items() if family.served == "fused"]
OTHERS = ["gpt2", "gemma2", "mixtral"]


def graphs(steps: list[StepRecord]) -> list[list[StepRecord]]:
    """The steps of each bucket: all rows are greedy."""
    by_rows = defaultdict(list)
    for step in steps:
        name, shape, _ = step.allocations[0]
        assert name == "embedding"
        by_rows[shape[1]].append(step)
    return list(by_rows.values())


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_family_is_captured_and_gives_hugging_faces_tokens(
    name: str, engine_of: Callable[..., Any]
):
    model = build(name)
    expected = [hf_alone(model, prompt, 7) for prompt in RAGGED]
    engine = engine_of(model, 3)
    recorder = Recorder()
    with recorder.watch(engine, captures=True):
        out = engine.rollout(RAGGED, GREEDY)
        assert [c.token_ids for c in out.completions] == expected
        ids = torch.randint(3, 128, (1, 20))
        engine.train()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        engine.eval()
        again = engine.rollout(RAGGED, GREEDY)
    assert out.stats.graph_reason == again.stats.graph_reason == ""
    assert again.stats.graph_hits > 0 < out.stats.graph_hits
    assert again.stats.graph_captures == 0
    (steps,) = graphs(recorder.steps)
    assert graph_violations(steps) == []
    layers = model.config.num_hidden_layers
    assert max(len(step.launches) for step in steps) <= 9 * layers + 6 + 1


@pytest.mark.parametrize("name", OTHERS)
def test_another_family_is_not_and_says_why(name: str, engine_of: Callable[..., Any]):
    engine = engine_of(build(name), 0)
    with Recorder().watch(engine, captures=True):
        stats = engine.rollout(RAGGED, GREEDY).stats
    assert stats.path == FAMILIES[name].served != "fused"
    assert stats.graph_hits == 0
    assert "HF's own" in stats.graph_reason
