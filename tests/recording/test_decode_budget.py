"""The fused decode step keeps the launch budget and is legal inside a CUDA graph."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tritonhybrid
from tritonhybrid import SamplingParams
from tritonhybrid.local_engine import LocalEngineConfig, build_engine
from tritonhybrid.recording import Recorder, StepRecord

LAYERS = 4
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=32, **SIZES)),
}
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12] * 70]


@contextlib.contextmanager
def single_rank_engine(model: PreTrainedModel, zero_stage: int = 0) -> Iterator[Any]:
    engine = tritonhybrid.wrap(build_engine(model, LocalEngineConfig(zero_stage=zero_stage)))
    try:
        yield engine
    finally:
        tritonhybrid.unwrap(engine)
        engine.destroy()


def record(
    model: PreTrainedModel, sampling: SamplingParams, stage: int = 0
) -> tuple[list[StepRecord], Any]:
    recorder = Recorder()
    with single_rank_engine(model, zero_stage=stage) as engine, recorder.watch(engine):
        out = engine.rollout(PROMPTS, sampling)
    assert out.stats.path == "fused"
    assert len(recorder.steps) == out.stats.num_decode_steps == sampling.max_new_tokens - 1
    return recorder.steps, out


@pytest.fixture(scope="module", params=list(FAMILIES))
def steps(request: pytest.FixtureRequest) -> list[StepRecord]:
    torch.manual_seed(0)
    recorded, _ = record(FAMILIES[request.param](), SamplingParams(max_new_tokens=8))
    return recorded


def test_a_dense_layer_takes_nine_launches_and_the_rest_of_the_step_six(steps):
    per_layer = (
        2 * ["add_rms_norm"]
        + ["qkv_linear", "rope_kv_write"]
        + 2 * ["paged_attention_decode"]
        + 2 * ["linear"]
        + ["gate_up_silu"]
    )
    around = ["embedding", "add_rms_norm", "lm_head_sample", "lm_head_sample"]
    for step in steps:
        assert sorted(step.launches) == sorted(LAYERS * per_layer + around)
        assert len(step.launches) <= 9 * LAYERS + 6


def test_no_decode_step_reads_anything_on_the_host(steps):
    assert [step.host_reads for step in steps] == [[]] * len(steps)


def test_every_step_allocates_the_same_sizes_and_passes_the_same_scalars(steps):
    first = steps[0]
    for step in steps[1:]:
        assert step.allocations == first.allocations
        assert step.scalars == first.scalars


def test_long_lived_tensors_never_move_between_steps(steps):
    assert len(steps[0].pointers) > 9 * LAYERS
    for step in steps[1:]:
        assert step.pointers == steps[0].pointers


def test_the_bytes_moved_stay_within_five_percent_of_the_floor(steps):
    for step in steps:
        assert step.floor_bytes > 0
        assert step.floor_bytes <= step.num_bytes <= 1.05 * step.floor_bytes


def test_the_floor_counts_every_weight_once_and_the_keys_in_use():
    torch.manual_seed(0)
    model = FAMILIES["llama"]()
    recorded, _ = record(model, SamplingParams(max_new_tokens=3))
    # The embedding is looked up, not read whole; the untied head is read whole.
    weights = sum(p.nbytes for n, p in model.named_parameters() if "embed_tokens" not in n)
    row = 2 * 4 * 32 * 4
    for index, step in enumerate(recorded):
        context = sum(len(prompt) + 1 + index for prompt in PROMPTS)
        kv = LAYERS * row * (context + len(PROMPTS))
        assert step.floor_bytes == weights + kv


def test_pointers_stay_across_rollouts_and_a_training_step_under_zero_3():
    torch.manual_seed(0)
    recorder = Recorder()
    model = FAMILIES["llama"]()
    with single_rank_engine(model, zero_stage=3) as engine:
        with recorder.watch(engine):
            engine.rollout(PROMPTS, SamplingParams(max_new_tokens=3))
        ids = torch.randint(1, 100, (1, 8))
        engine.train()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        with recorder.watch(engine):
            engine.rollout(PROMPTS, SamplingParams(max_new_tokens=3))
    weights = [
        {name: at for name, at in step.pointers if name.endswith(("weight", "k_cache", "v_cache"))}
        for step in recorder.steps
    ]
    assert len(weights) == 4
    assert all(step == weights[0] for step in weights)


def test_the_recorded_step_samples_what_hf_decodes():
    torch.manual_seed(0)
    model = FAMILIES["llama"]()
    reference = {
        tuple(p): model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False)[0, len(p) :]
        for p in PROMPTS
    }
    _, out = record(model, SamplingParams(max_new_tokens=6, temperature=0))
    for completion, prompt in zip(out.completions, PROMPTS, strict=True):
        assert completion.token_ids == reference[tuple(prompt)].tolist()


@contextlib.contextmanager
def a_step(recorder: Recorder) -> Iterator[None]:
    with recorder.step():
        yield


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.sum().item(), "item"),
        (lambda x: bool(x[0] > 0), "__bool__"),
        (lambda x: x[x > 0], "aten::index"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: torch.tensor([1, 2]), "tensor"),
    ],
)
def test_the_recorder_notices_each_way_of_looking_at_the_host(read, name):
    recorder = Recorder()
    with a_step(recorder):
        read(torch.arange(4))
    assert name in recorder.steps[0].host_reads


def test_the_recorder_notices_a_pointer_that_moves_and_a_size_that_changes():
    recorder = Recorder()
    ops = recorder.ops()
    weight = torch.randn(8, 4)
    for rows, w in ((2, weight), (3, weight.clone())):
        x = torch.randn(rows, 4)
        with recorder.step():
            ops.linear(x, w)
    first, second = recorder.steps
    assert first.allocations != second.allocations
    assert first.pointers != second.pointers
