"""Decode steps captured as on CUDA: legal in a graph, within the budget, and the same tokens."""

import contextlib
from collections import defaultdict
from dataclasses import replace

import deepspeed
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tritonhybrid
from tritonhybrid import SamplingParams
from tritonhybrid.local_engine import LocalEngineConfig, build_engine
from tritonhybrid.recording import Recorder, graph_violations

LAYERS = 2
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SIZES)),
}
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12] * 15, [7, 3, 1], [13, 14, 15]]
GREEDY = SamplingParams(max_new_tokens=10, temperature=0)
SAMPLINGS = {
    "greedy": GREEDY,
    "random": SamplingParams(max_new_tokens=10, seed=3),
    "temperature": SamplingParams(max_new_tokens=10, seed=3, temperature=0.7, top_k=200),
    "filters": SamplingParams(max_new_tokens=10, seed=3, top_k=40, top_p=0.9, min_p=0.01),
    "top_p": SamplingParams(max_new_tokens=10, seed=3, top_p=0.8),
    "min_p": SamplingParams(max_new_tokens=10, seed=3, min_p=0.02, n=3),
}


@contextlib.contextmanager
def an_engine(model, stage=0, **config):
    config = {"block_size": 16, **config}
    engine = build_engine(model, LocalEngineConfig(zero_stage=stage))
    engine = tritonhybrid.wrap(engine, config=config)
    try:
        yield engine
    finally:
        tritonhybrid.unwrap(engine)
        engine.destroy()


def make(family="llama"):
    torch.manual_seed(0)
    return FAMILIES[family]()


def train(engine):
    ids = torch.randint(1, 100, (1, 8))
    engine.train()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.eval()


def by_rows(steps):
    """Recorded steps by the rows of their embedding: those of one graph, if rows sample alike."""
    graphs = defaultdict(list)
    for step in steps:
        name, shape, _ = step.allocations[0]
        assert name == "embedding"
        graphs[shape[1]].append(step)
    return graphs


def assert_alike(one, other):
    """The same tokens and ends; log-probabilities to the rounding of another batch's products."""
    for mine, theirs in zip(one.completions, other.completions, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.finish_reason == theirs.finish_reason
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert mine.raw_logprobs == pytest.approx(theirs.raw_logprobs, abs=1e-5)


@pytest.fixture(scope="module", params=[(f, s) for f in FAMILIES for s in (0, 3)], ids=str)
def claimed(request):
    """Two rollouts with an optimizer step between them, captured."""
    family, stage = request.param
    recorder = Recorder()
    stats = []
    with an_engine(make(family), stage) as engine:
        with recorder.watch(engine, captures=True):
            stats.append(engine.rollout(PROMPTS, SAMPLINGS["random"]).stats)
        train(engine)
        with recorder.watch(engine, captures=True):
            # Fewer sequences, other lengths: the same addresses all the same.
            stats.append(engine.rollout(PROMPTS[:3], SAMPLINGS["random"]).stats)
    return recorder.steps, stats


def test_captured_steps_do_nothing_that_a_graph_may_not_hold(claimed):
    steps, _ = claimed
    graphs = by_rows(steps)
    assert set(graphs) == {8, 4}
    for captured in graphs.values():
        assert len(captured) > 8
        assert graph_violations(captured) == []


def test_a_captured_step_keeps_the_launch_budget(claimed):
    steps, _ = claimed
    for step in steps:
        assert step.launches.count("decode_advance") == 1
        assert len(step.launches) - 1 <= 9 * LAYERS + 6


def test_graphs_live_across_rollouts_and_an_optimizer_step(claimed):
    _, (first, second) = claimed
    assert first.path == second.path == "fused"
    assert first.graph_reason == second.graph_reason == ""
    # 9 tokens after the first: two replays of four steps, one of one step.
    assert (first.graph_hits, second.graph_hits) == (3, 3)
    assert first.graph_captures == 2
    # The smaller batch has graphs of its own; none was captured again.
    assert second.graph_captures == 2
    assert first.graph_recaptures == second.graph_recaptures == 0


@pytest.mark.parametrize("name", list(SAMPLINGS))
def test_every_way_of_sampling_is_legal_inside_a_graph(name):
    recorder = Recorder()
    with an_engine(make()) as engine, recorder.watch(engine, captures=True):
        out = engine.rollout(PROMPTS, SAMPLINGS[name])
    assert out.stats.graph_reason == ""
    assert out.stats.graph_hits == 3
    for steps in by_rows(recorder.steps).values():
        assert graph_violations(steps) == []


def test_rows_that_sample_unlike_share_one_legal_graph():
    recorder = Recorder()
    mixed = [SAMPLINGS[name] for name in ("greedy", "random", "filters", "top_p", "temperature")]
    with an_engine(make()) as engine, recorder.watch(engine, captures=True):
        out = engine.rollout(PROMPTS, mixed)
    assert out.stats.graph_reason == ""
    assert out.stats.sampler == "argmax+gumbel_max+inverse_cdf"
    (steps,) = by_rows(recorder.steps).values()
    assert graph_violations(steps) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("read", "reads tolist on the host"),
        ("move", "has other pointers"),
        ("grow", "has other allocations"),
        ("vary", "has other scalars"),
        ("more", "has other launches"),
    ],
)
def test_the_gate_refuses_a_step_that_breaks_a_rule(name, words):
    recorder = Recorder()
    norm = recorder._ops.add_rms_norm
    calls = iter(range(1000))

    def broken(x, weight, eps, **kwargs):
        call = next(calls)
        if name == "read":
            x.tolist()
        if name == "grow":
            torch.empty(call + 1)
        if name == "more" and len(recorder.steps) > 2:
            x = x + 0
        if name == "move":
            with torch.utils._python_dispatch._disable_current_modes():
                weight = weight.clone()
            kept.append(weight)
        return norm(x, weight, eps + (call * 1e-12 if name == "vary" else 0), **kwargs)

    kept = []
    recorder._ops = replace(recorder._ops, add_rms_norm=broken)
    with an_engine(make()) as engine, recorder.watch(engine, captures=True):
        engine.rollout(PROMPTS, GREEDY)
    (steps,) = by_rows(recorder.steps).values()
    assert any(words in violation for violation in graph_violations(steps))


@pytest.mark.parametrize("stage", [0, 3])
def test_replayed_tokens_are_those_of_hf(stage):
    model = make()
    reference = [
        model.generate(torch.tensor([p]), max_new_tokens=10, do_sample=False)[0, len(p) :].tolist()
        for p in PROMPTS
    ]
    with an_engine(model, stage) as engine, Recorder().watch(engine, captures=True):
        out = engine.rollout(PROMPTS, GREEDY)
    assert [c.token_ids for c in out.completions] == reference


@pytest.mark.parametrize("name", list(SAMPLINGS))
@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_tokens_and_logprobs_are_the_same_however_many_steps_a_replay_has(name, num_steps):
    sampling = replace(SAMPLINGS[name], eos_token_id=list(range(0, 512, 9)), n=2)
    plain, replayed = {"enable_cuda_graph": False}, {"decode_steps_per_replay": num_steps}
    results = []
    for config, captures in ((plain, False), (replayed, True)):
        with (
            an_engine(make(), max_num_seqs=6, **config) as engine,
            Recorder().watch(engine, captures=captures),
        ):
            out = engine.rollout(PROMPTS, sampling)
        results.append(out)
    assert out.stats.graph_hits > 0
    assert "stop" in {completion.finish_reason for completion in out.completions}
    assert_alike(*results)


@pytest.mark.parametrize("num_steps", [2, 4])
def test_several_steps_between_looks_need_no_graphs(num_steps):
    """On the torch backend itself, over the paths that serve a CPU."""
    sampling = replace(SAMPLINGS["filters"], eos_token_id=list(range(0, 512, 9)), n=2)
    results = []
    for config in ({}, {"decode_steps_per_replay": num_steps}):
        with an_engine(make(), **config) as engine:
            results.append(engine.rollout(PROMPTS, sampling))
    once, several = results
    assert_alike(several, once)
    assert once.stats.overrun_tokens == 0 < several.stats.overrun_tokens
    assert several.stats.graph_hits == 0


def test_pages_for_all_steps_are_reserved_or_the_steps_shrink():
    """A cache so small that sequences are set back, and steps shrink before that."""
    sampling = SamplingParams(max_new_tokens=40, seed=5)
    results = []
    for captures in (False, True):
        model = make()
        per_page = 2 * 2 * 16 * 16 * 4 * LAYERS
        with (
            an_engine(model, kv_cache_bytes=8 * per_page) as engine,
            Recorder().watch(engine, captures=captures),
        ):
            results.append(engine.rollout(PROMPTS, sampling))
            state = engine.__dict__["_tritonhybrid"]
            state.generation.blocks.check_integrity([])
    assert results[1].stats.preemptions > 0 and results[1].stats.graph_hits > 0
    assert_alike(*results)


def test_a_cache_that_has_grown_is_captured_anew_and_counted():
    with an_engine(make()) as engine, Recorder().watch(engine, captures=True):
        first = engine.rollout(PROMPTS[:2], GREEDY).stats
        longer = engine.rollout([[3] * 60] * 2, GREEDY).stats
        again = engine.rollout(PROMPTS[:2], GREEDY).stats
    assert (first.graph_captures, first.graph_recaptures) == (2, 0)
    assert (longer.graph_captures, longer.graph_recaptures) == (2, 2)
    assert (again.graph_captures, again.graph_recaptures) == (0, 0)


def test_captured_steps_end_with_the_cache_they_were_captured_with():
    config = {"release_inference_cache": True}
    model = make()
    expected = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=10, do_sample=False)
    with an_engine(model, **config) as engine, Recorder().watch(engine, captures=True):
        for _ in range(2):
            out = engine.rollout(PROMPTS[:1], GREEDY)
            assert out.stats.graph_captures == 2
            assert out.completions[0].token_ids == expected[0, len(PROMPTS[0]) :].tolist()


def test_replays_use_the_weights_of_the_last_optimizer_step():
    model = make()
    with an_engine(model, 3) as engine, Recorder().watch(engine, captures=True):
        before = engine.rollout(PROMPTS, SAMPLINGS["random"])
        for _ in range(3):
            train(engine)
        after = engine.rollout(PROMPTS, SAMPLINGS["random"])
    assert after.stats.graph_captures == 0 and after.stats.graph_hits == before.stats.graph_hits
    with an_engine(model, 0, enable_cuda_graph=False) as engine, Recorder().watch(engine):
        plain = engine.rollout(PROMPTS, SAMPLINGS["random"])
    assert_alike(after, plain)
    new, old = (torch.tensor([c.logprobs for c in out.completions]) for out in (after, before))
    assert (new - old).abs().max() > 1e-3


def test_non_finite_logits_are_noticed_at_their_own_position():
    model = make()
    with torch.no_grad():
        expected = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False)
        third = int(expected[0, len(PROMPTS[0]) + 2])
        assert third not in expected[0, : len(PROMPTS[0]) + 2].tolist()
        model.model.embed_tokens.weight[third] = float("nan")
    with an_engine(model) as engine, Recorder().watch(engine, captures=True):
        with pytest.raises(tritonhybrid.NonFiniteLogitsError) as caught:
            engine.rollout(PROMPTS[:1], GREEDY)
        assert caught.value.position == len(PROMPTS[0]) + 3
        ended = replace(GREEDY, eos_token_id=third)
        out = engine.rollout(PROMPTS[:1], ended)
    assert out.completions[0].token_ids[-1] == third
    assert out.stats.overrun_tokens > 0


def reason_of(engine, sampling=GREEDY, **watch):
    with Recorder().watch(engine, captures=True):
        out = engine.rollout(PROMPTS, sampling)
    return out.stats.graph_reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"repetition_penalty": 1.3}, "penalties"),
        ({"suppress_tokens": (7,)}, "rules for single tokens"),
        ({"top_logprobs": 2}, "top_logprobs or entropy"),
        ({"min_new_tokens": 3}, "min_new_tokens"),
    ],
)
def test_steps_that_the_host_prepares_are_not_replayed_and_say_why(change, reason):
    sampling = [GREEDY, replace(GREEDY, **change)]
    with an_engine(make()) as engine, Recorder().watch(engine, captures=True):
        out = engine.rollout(PROMPTS[:2], sampling)
    with an_engine(make()) as engine, Recorder().watch(engine):
        plain = engine.rollout(PROMPTS[:2], sampling)
    assert out.stats.graph_reason == f"the host prepares each token: {reason}"
    assert_alike(out, plain)
    # Of nine steps two come too early for an end; then four in one replay, three in one each.
    assert out.stats.graph_hits == (4 if reason == "min_new_tokens" else 0)
    assert out.stats.overrun_tokens == 0


def test_a_hook_an_adapter_and_a_torch_path_keep_graphs_off():
    model = make()
    with an_engine(model) as engine:
        handle = model.model.register_forward_hook(lambda *args: None)
        assert reason_of(engine) == "a replay would pass over the hook on model"
        handle.remove()
        assert reason_of(engine) == ""
    with an_engine(get_peft_model(make(), LoraConfig(target_modules=["o_proj"]))) as engine:
        assert reason_of(engine) == "layer 0 calls a Linear"
    recorder = Recorder()
    recorder._ops = replace(recorder._ops, torch_ops=frozenset({"attention_varlen", "linear"}))
    with an_engine(make()) as engine, recorder.watch(engine, captures=True):
        stats = engine.rollout(PROMPTS, GREEDY).stats
    assert stats.graph_reason == "torch paths may read the host: linear"
    assert stats.graph_hits == 0 and stats.num_decode_steps == 9


def test_layers_in_hfs_own_code_keep_graphs_off_and_look_at_each_token():
    model = make()
    model.model.layers[1].self_attn.register_forward_hook(lambda *args: None)
    with an_engine(model, decode_steps_per_replay=4) as engine:
        assert reason_of(engine) == "1 layers run in HF's own code"
        assert engine.stats.path == "generic"
        assert engine.stats.overrun_tokens == 0
        note = "decode_steps_per_replay is 1 where layers run in HF's own code"
        assert note in engine.stats.notes


def test_a_foreign_gather_keeps_graphs_off():
    with an_engine(make(), 3) as engine:
        parameters = list(engine.module.parameters())
        for parameter in parameters:
            # So small that DeepSpeed would keep them whole.
            parameter.ds_persist = False
        with deepspeed.zero.GatheredParameters(parameters):
            assert reason_of(engine) == "the caller's gather brings new addresses with each call"
        assert reason_of(engine) == ""


def test_graphs_are_off_by_default_and_on_a_cpu():
    with an_engine(make()) as engine:
        engine.rollout(PROMPTS, GREEDY)
        reason = engine.stats.graph_reason
    assert reason == 'enable_cuda_graph is "auto": off until a GPU has run graphs'
    with an_engine(make(), enable_cuda_graph=False) as engine:
        assert reason_of(engine) == "enable_cuda_graph is false"
    engine = build_engine(make(), LocalEngineConfig(zero_stage=0))
    with pytest.raises(tritonhybrid.ConfigError, match="enable_cuda_graph needs a CUDA device"):
        tritonhybrid.wrap(engine, config={"enable_cuda_graph": True})
    engine.destroy()


@pytest.mark.parametrize("original", [8, 14, 200])
def test_two_rope_tables_are_replayed_with_the_rows_of_each_position(original):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": original,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope))
    results = []
    recorder = Recorder()
    for captures in (False, True):
        with an_engine(model) as engine, recorder.watch(engine, captures=captures):
            results.append(engine.rollout(PROMPTS, GREEDY))
    assert_alike(*results)
    assert results[1].stats.graph_reason == ""
    for steps in by_rows(recorder.steps[9:]).values():
        assert graph_violations(steps) == []


def test_a_stream_and_a_resumed_rollout_are_replayed():
    with an_engine(make()) as engine, Recorder().watch(engine, captures=True):
        whole = engine.rollout(PROMPTS, SAMPLINGS["random"])
        with engine.rollout_stream(PROMPTS, SAMPLINGS["random"]) as stream:
            streamed = sorted(stream, key=lambda c: c.prompt_index)
        assert stream.stats.graph_hits == 3
        part = engine.rollout(PROMPTS, SAMPLINGS["random"], token_budget=25)
        rest = engine.resume(part.paused)
        assert rest.stats.graph_hits > 0 and rest.stats.graph_captures == 0
    for others in (streamed, rest.completions):
        assert [c.token_ids for c in others] == [c.token_ids for c in whole.completions]
