"""Every family of docs/families.md against Hugging Face, and the path that serves it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero import GatheredParameters
from family_zoo import FAMILIES, TABLE, build, table
from hf_reference import hf_alone, prompts
from transformers import LlamaForCausalLM

from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.testing import check_family, hold

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def train_a_step(engine: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 128, (1, 20), generator=generator)
    engine.train()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.eval()


def weights_by_deepspeed(engine: Any) -> dict[str, torch.Tensor]:
    with GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def weights_of_a_rollout(engine: Any) -> dict[str, torch.Tensor]:
    with engine.__dict__["_tritonhybrid"].generation.source.materialised():
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


@pytest.mark.parametrize("stage", [0, 3], ids="ZeRO-{}".format)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_and_logprobs_are_hugging_faces(
    name: str, stage: int, engine_of: Callable[..., Any]
):
    model = build(name)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = engine_of(model, stage)
    assert all(p.numel() == 0 for p in model.parameters()) == (stage == 3)
    train_a_step(engine)
    trained = weights_by_deepspeed(engine)
    torch.testing.assert_close(weights_of_a_rollout(engine), trained, rtol=0, atol=0)
    assert any(not torch.equal(trained[name], initial[name]) for name in initial)
    report = check_family(engine, path=FAMILIES[name].served, max_new_tokens=12)
    assert report.num_equal == report.num_tokens > 40
    assert report.max_logprob_error <= 2e-4
    assert engine.stats.strategy == ("pinned" if stage == 3 else "resident")


def test_llama_qwen2_and_qwen3_are_fused():
    assert {FAMILIES[name].path for name in ("llama", "qwen2", "qwen3")} == {"fused"}


def test_the_table_of_families_is_what_the_tests_prove():
    assert TABLE.read_text() == table()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_bf16_is_as_close_to_fp32_as_hugging_faces_own(name: str):
    report = check_family(build(name), dtype=torch.bfloat16, path=FAMILIES[name].path)
    assert report.dtype == "bfloat16"
    assert 0 < report.max_logprob_error < 1


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_ropes_are_fused(rope: dict):
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    check_family(model, path="fused", max_new_tokens=12)


def test_dynamic_ntk_rope_goes_to_hugging_faces_loop():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    report = check_family(build("llama", rope_parameters=rope), path="hf", max_new_tokens=8)
    assert "dynamic NTK" in report.notes[0]


def test_a_model_on_hugging_faces_loop_says_so_in_each_call_and_logs_it_once(
    caplog: pytest.LogCaptureFixture,
):
    engine = hold(build("bloom"))
    with caplog.at_level(logging.WARNING, logger="tritonhybrid"):
        notes = [engine.rollout(prompts(4), GREEDY).stats.notes for _ in range(2)]
    assert notes[0] == notes[1]
    assert "HF's own loop serves this model" in notes[0][0]
    assert [record.getMessage() for record in caplog.records] == [f"tritonhybrid: {notes[0][0]}"]


def test_prompts_of_unequal_length_on_hugging_faces_loop_are_those_of_each_alone():
    model = build("mpt")
    ragged = prompts(3, 9, 3, 21)
    out = hold(model).rollout(ragged, GREEDY)
    assert [c.token_ids for c in out.completions] == [hf_alone(model, p, 12) for p in ragged]


def test_each_sequence_on_hugging_faces_loop_has_its_own_length_end_and_noise():
    model = build("falcon")
    engine = hold(model)
    prompt, other = prompts(4, 4)
    free = hf_alone(model, prompt, 12)
    at = next(i for i in range(2, 12) if free[i] not in free[:i])
    params = [
        SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True),
        SamplingParams(max_new_tokens=12, temperature=0.0, stop_token_ids=[free[at]]),
        SamplingParams(max_new_tokens=9, n=3, seed=5, ignore_eos=True),
    ]
    out = engine.rollout([prompt, prompt, other], params)
    tokens = [completion.token_ids for completion in out.completions]
    assert tokens[:2] == [free[:3], free[: at + 1]]
    assert [c.finish_reason for c in out.completions[:2]] == ["length", "stop"]
    assert len({tuple(row) for row in tokens[2:]}) == 3 and {len(row) for row in tokens[2:]} == {9}
    alone = engine.rollout([other], params[2], uids=[2])
    assert [completion.token_ids for completion in alone.completions] == tokens[2:]


def test_beams_in_the_models_generation_config_do_not_reach_hugging_faces_loop():
    model = build("mpt")
    ragged = prompts(3, 9)
    expected = [hf_alone(model, prompt, 12) for prompt in ragged]
    model.generation_config.num_beams = 2
    out = hold(model).rollout(ragged, GREEDY)
    assert [c.token_ids for c in out.completions] == expected


def test_check_family_raises_where_another_path_serves():
    with pytest.raises(AssertionError, match="served on the fused path, not generic"):
        check_family(build("llama"), path="generic", max_new_tokens=2)


def test_check_family_raises_where_tokens_differ():
    class Shifted(LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs).add(1)

    model = build("llama")
    model.__class__ = Shifted
    with pytest.raises(AssertionError, match="rollout differs from HF's greedy tokens of prompt 0"):
        check_family(model, max_new_tokens=2)
