"""Longrope's two tables: each sequence has the one that Hugging Face's generate would take.

Phi-3 and Phi-MoE compute a sequence anew when it outgrows the short table; a Llama with such a
rope keeps what is in its cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from family_zoo import build
from hf_reference import hf_alone, prompts
from packaging.version import Version

from tritonhybrid import SamplingParams
from tritonhybrid.containers.parts import cache_name
from tritonhybrid.long_rope import LongRope
from tritonhybrid.recording import Recorder
from tritonhybrid.testing import check_family, hold

ORIGINAL = 32
NEW = 12
GREEDY = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
# Short for good, up to the last short position, one past it, crossing, at the limit, long at once.
RAGGED = prompts(5, 20, 21, 28, 31, 32, 33, 40)
ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
}
PATHS = {"llama": "fused"}
# Before 5.20 their generate drops the cache and then runs a single token: Hugging Face's loop.
if Version(transformers.__version__) >= Version("5.20"):
    PATHS |= {"phi3": "generic", "phimoe": "generic"}


def long_model(name: str) -> Any:
    settings: dict[str, Any] = {"rope_parameters": dict(ROPE), "sliding_window": None}
    if name != "llama":
        settings["original_max_position_embeddings"] = ORIGINAL
    if name == "phimoe":
        settings["rope_parameters"] |= {"short_mscale": 1.1, "long_mscale": 1.3}
    return build(name, **settings)


@pytest.fixture(scope="module", params=PATHS)
def model(request: pytest.FixtureRequest) -> Any:
    model = long_model(request.param)
    model.family = request.param
    return model


@pytest.fixture(scope="module")
def tokens_alone(model: Any) -> list[list[int]]:
    return [hf_alone(model, prompt, NEW, eos_token_id=None) for prompt in RAGGED]


def tokens_of(out: Any) -> list[list[int]]:
    return [completion.token_ids for completion in out.completions]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": 1},
        # 16 pages of 4 tokens; the longest sequence takes 13.
        {"block_size": 4, "kv_cache_bytes": 16 * 4 * 2 * 2 * 2 * 8 * 4},
    ],
    ids=["together", "two-at-a-time", "prompt-by-prompt", "preempted"],
)
def test_every_sequence_has_the_table_of_its_own(
    model: Any, tokens_alone: list[list[int]], settings: dict[str, int]
):
    out = hold(model, config=settings).rollout(RAGGED, GREEDY)
    assert out.stats.path == PATHS[model.family]
    assert tokens_of(out) == tokens_alone
    if "kv_cache_bytes" in settings:
        assert out.stats.kv_bytes <= settings["kv_cache_bytes"]
        assert out.stats.preemptions > 0


def test_the_two_tables_give_different_tokens(model: Any, tokens_alone: list[list[int]]):
    shorter = copy.deepcopy(model)
    shorter.config.rope_parameters["original_max_position_embeddings"] = 2**20
    if model.family != "llama":
        shorter.config.original_max_position_embeddings = 2**20
    always_short = [hf_alone(shorter, prompt, NEW, eos_token_id=None) for prompt in RAGGED]
    assert always_short[:2] == tokens_alone[:2]
    assert all(a != b for a, b in zip(always_short[3:], tokens_alone[3:], strict=True))


def test_logprobs_are_those_of_the_steps_that_hugging_face_takes(model: Any):
    out = hold(model).rollout(RAGGED, GREEDY)
    for prompt, completion in zip(RAGGED, out.completions, strict=True):
        steps = hf_alone(
            model, prompt, NEW, eos_token_id=None, output_logits=True, return_dict_in_generate=True
        )
        table = torch.cat(steps.logits).double().log_softmax(-1)
        exact = table.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        ours = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(ours, exact, rtol=0, atol=2e-4)


def test_a_call_whose_sequences_change_tables_says_so(model: Any):
    engine = hold(model)
    crossing = engine.rollout(RAGGED[3:4], GREEDY).stats.notes
    assert [note for note in crossing if f"outgrew longrope's {ORIGINAL} positions" in note]
    assert engine.rollout([RAGGED[0], RAGGED[-1]], GREEDY).stats.notes == []


def test_samples_of_a_prompt_part_from_its_pages_when_they_outgrow_the_short_table(
    model: Any, tokens_alone: list[list[int]]
):
    three = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True, n=3)
    out = hold(model, config={"block_size": 16}).rollout(RAGGED[3:5], three)
    assert tokens_of(out) == [tokens_alone[3]] * 3 + [tokens_alone[4]] * 3
    assert out.stats.preemptions == 0


@pytest.mark.parametrize("stage", [0, 3], ids="ZeRO-{}".format)
@pytest.mark.parametrize("name", PATHS)
def test_both_tables_serve_under_deepspeed(name: str, stage: int, engine_of: Callable[..., Any]):
    model = long_model(name)
    expected = [hf_alone(model, prompt, NEW, eos_token_id=None) for prompt in RAGGED]
    out = engine_of(model, stage).rollout(RAGGED, GREEDY)
    assert out.stats.path == PATHS[name]
    assert tokens_of(out) == expected


def test_layers_on_two_paths_share_the_tables():
    model = long_model("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.1)
    out = hold(model).rollout(RAGGED, GREEDY)
    assert out.stats.path == "generic" and len(out.stats.layer_paths) == 2
    assert tokens_of(out) == [hf_alone(model, p, NEW, eos_token_id=None) for p in RAGGED]


def test_sequences_within_the_short_table_are_served_like_any_others(model: Any):
    within = prompts(5, 20, 17)
    check_family(model, prompts=within, max_new_tokens=NEW, path=PATHS[model.family])


def test_a_rollout_leaves_the_rotary_module_as_it_was(model: Any):
    rotary = model.model.rotary_emb
    engine = hold(model)
    hf_alone(model, RAGGED[0], 2)
    before = {id(t): t.clone() for t in rotary.buffers()}
    names = {name: id(value) for name, value in rotary.__dict__.items()}
    engine.rollout(RAGGED, GREEDY)
    assert {name: id(value) for name, value in rotary.__dict__.items()} == names
    after = {id(t): t.clone() for t in rotary.buffers()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert model.config.rope_parameters["original_max_position_embeddings"] == ORIGINAL


@pytest.mark.parametrize("table", ["short", "long"])
def test_the_probe_notices_a_table_that_is_wrong(
    model: Any, table: str, monkeypatch: pytest.MonkeyPatch
):
    offset = 0 if table == "short" else 1
    monkeypatch.setattr(LongRope, "row", lambda self, s, p: p + offset * self.original)
    out = hold(model).rollout(RAGGED[2:4], GREEDY)
    assert out.stats.path == "hf"
    assert "differ from HF" in out.stats.notes[0]


def padded(*rows: list[int]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("rows", "path"),
    [
        ([RAGGED[3]], "native"),
        ([RAGGED[3], RAGGED[3][::-1]], "native"),
        ([RAGGED[6], RAGGED[7]], "native"),
        ([RAGGED[0], RAGGED[1]], "native"),
        ([RAGGED[0], RAGGED[3]], "hf"),
        ([RAGGED[3], RAGGED[7]], "hf"),
    ],
    ids=["one", "equal-lengths", "all-long", "all-short", "one-crosses", "one-long"],
)
def test_generate_gives_hugging_faces_tokens_of_the_padded_batch(
    model: Any, rows: list[list[int]], path: str
):
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    engine = hold(model)
    ours = engine.generate(**padded(*rows), **kwargs)
    assert engine.stats.path == (PATHS[model.family] if path == "native" else "hf")
    if path == "hf":
        assert "follows the longest row" in engine.stats.notes[0]
    assert torch.equal(ours, model.generate(**padded(*rows), **kwargs))


def test_a_rotary_module_that_is_watched_goes_to_hugging_faces_loop():
    model = long_model("llama")
    model.model.rotary_emb.register_forward_hook(lambda module, args, out: None)
    out = hold(model).rollout(RAGGED, GREEDY)
    assert out.stats.path == "hf"
    assert "has a hook" in out.stats.notes[0]
    assert tokens_of(out) == [hf_alone(model, p, NEW, eos_token_id=None) for p in RAGGED]


def test_a_generate_that_drops_its_cache_by_another_rule_goes_to_hugging_faces_loop():
    model = long_model("phi3")

    class Forgetful(type(model)):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            if input_ids.shape[1] == ORIGINAL:
                kwargs |= {"next_sequence_length": None, cache_name(self): None}
            return super().prepare_inputs_for_generation(input_ids, **kwargs)

    model.__class__ = Forgetful
    out = hold(model).rollout(RAGGED[:1], SamplingParams(max_new_tokens=30, temperature=0.0))
    assert out.stats.path == "hf"
    assert "drops its cache" in out.stats.notes[0]


@pytest.mark.parametrize("name", [name for name in PATHS if name != "phimoe"])
def test_decode_steps_stay_fit_for_a_graph(name: str, engine_of: Callable[..., Any]):
    recorder = Recorder()
    engine = engine_of(long_model(name), 0)
    with recorder.watch(engine):
        engine.rollout([RAGGED[0], RAGGED[-1]], GREEDY)
    assert len(recorder.steps) == NEW - 1
    assert [step.host_reads for step in recorder.steps] == [[]] * len(recorder.steps)
    for step in recorder.steps[1:]:
        assert step.allocations == recorder.steps[0].allocations
        assert step.pointers == recorder.steps[0].pointers
