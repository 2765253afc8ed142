"""TritonRollout keeps DeepSpeed's rollout contract to the letter."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.rollout import (
    HybridEngineRollout,
    ResponseTokenBatch,
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    SamplingConfig,
)

import tritonhybrid
from tritonhybrid import EngineStateError, TritonRollout
from tritonhybrid.local_engine import LocalEngineConfig, build_engine

PAD = 0
PROMPTS = torch.tensor([[PAD, PAD, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def tokenizer(pad=PAD, eos=None):
    return SimpleNamespace(pad_token_id=pad, eos_token_id=eos)


def request_() -> RolloutRequest:
    return RolloutRequest(prompt_ids=PROMPTS, prompt_attention_mask=MASK)


def greedy(plain, row, new, eos=None):
    ids = PROMPTS[row : row + 1, MASK[row].bool()]
    out = plain.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=eos)
    return out[0, ids.shape[1] :].tolist()


def test_it_is_a_rollout_engine_and_its_batch_a_rollout_batch(served):
    rollout = TritonRollout(served[0], tokenizer(eos=1))
    assert isinstance(rollout, RolloutEngine)
    assert rollout.name == "tritonhybrid"
    batch = rollout.generate(request_(), SamplingConfig(max_new_tokens=3))
    assert isinstance(batch, RolloutBatch)
    rollout.sync_weights(1)
    rollout.shutdown()


def test_rows_are_grouped_by_prompt_and_prompts_keep_their_mask(served):
    engine, plain = served
    batch = TritonRollout(engine, tokenizer()).generate(
        request_(), SamplingConfig(max_new_tokens=4, temperature=0.0, n_samples_per_prompt=3)
    )
    assert batch.input_ids.shape == (6, 9)
    assert batch.response_start_idx.tolist() == [5] * 6
    for row in range(6):
        assert batch.input_ids[row, :5].tolist() == PROMPTS[row // 3].tolist()
        assert batch.attention_mask[row, :5].tolist() == MASK[row // 3].tolist()
        assert batch.input_ids[row, 5:].tolist() == greedy(plain, row // 3, 4)


def test_the_first_eos_is_kept_and_attended_even_when_it_is_the_pad_token(served):
    engine, plain = served
    eos = greedy(plain, 0, 3)[1]
    batch = TritonRollout(engine, tokenizer(pad=None, eos=[eos])).generate(
        request_(), SamplingConfig(max_new_tokens=6, temperature=-1.0)
    )
    expected = greedy(plain, 0, 6)
    end = expected.index(eos) + 1
    assert batch.input_ids[0, 5 : 5 + end].tolist() == expected[:end]
    assert batch.attention_mask[0, 5:].tolist() == [1] * end + [0] * (
        batch.attention_mask.shape[1] - 5 - end
    )
    assert batch.input_ids[0, 5 + end :].tolist() == [eos] * (batch.input_ids.shape[1] - 5 - end)


def test_sampled_rows_carry_the_logprobs_of_a_training_forward(served):
    engine, plain = served
    batch = TritonRollout(engine, tokenizer(eos=1)).generate(
        request_(), SamplingConfig(max_new_tokens=5, temperature=0.7, n_samples_per_prompt=2)
    )
    with torch.no_grad():
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp_min(0)
        logits = plain(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
        ).logits.double()
    for scale, ours in ((1.0, batch.raw_logprobs), (0.7, batch.logprobs)):
        exact = (logits / scale).log_softmax(-1)[:, :-1]
        picked = exact.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)[:, 4:]
        live = batch.attention_mask[:, 5:].bool()
        assert torch.allclose(ours[:, 5:].double()[live], picked[live], atol=2e-4)
        assert (ours[:, :5] == 0).all()
        assert (ours[:, 5:][~live] == 0).all()


def test_deepspeeds_own_target_builder_makes_targets_of_the_sampled_tokens(served):
    engine, plain = served
    # A third of the vocabulary ends a row, so that rows end at different places.
    ends = list(range(20, 29))
    batch = TritonRollout(engine, tokenizer(eos=ends)).generate(
        request_(), SamplingConfig(max_new_tokens=8, n_samples_per_prompt=4)
    )
    targets = ResponseTokenBatch.from_rollout(batch)
    widths = set()
    for row in range(8):
        response = batch.input_ids[row, 5:].tolist()
        end = next((place for place, token in enumerate(response) if token in ends), 7) + 1
        widths.add(end)
        assert response[end:] == [PAD] * (len(response) - end)
        # Logits at position 4, the prompt's last token, predict the first target.
        assert targets.response_mask[row].tolist() == (
            [False] * 4 + [True] * end + [False] * (len(response) - end)
        )
        assert targets.target_ids[row, 4 : 4 + end].tolist() == response[:end]
    assert len(widths) > 1
    with torch.no_grad():
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp_min(0)
        logits = plain(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
        ).logits
    exact = targets.select_causal_logits(logits).double().log_softmax(-1)
    picked = exact.gather(-1, targets.target_ids[..., None]).squeeze(-1)
    ours = batch.raw_logprobs[:, 1:].double()
    assert torch.allclose(ours[targets.response_mask], picked[targets.response_mask], atol=2e-4)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("has_pad", "place", "form"),
    [
        (True, None, None),
        (True, 1, int),
        (True, 2, lambda token: [token, token + 1]),
        (True, 0, lambda token: torch.tensor([token])),
        (False, 1, int),
        (False, 0, int),
    ],
    ids=["no EOS", "EOS", "EOS list", "EOS tensor, at once", "pad is EOS", "pad is EOS, at once"],
)
def test_greedy_batches_are_those_of_deepspeeds_own_rollout(served, n, has_pad, place, form):
    engine, plain = served
    sampled = [greedy(plain, row, 6) for row in range(2)]
    eos = None if place is None else form(sampled[0][place])
    # DeepSpeed's default mode masks a pad token that was sampled.
    unseen = next(token for token in range(29) if token not in sampled[0] + sampled[1])
    pad = unseen if has_pad else None
    words = tokenizer(pad=pad, eos=eos)
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0, n_samples_per_prompt=n)
    theirs = HybridEngineRollout(SimpleNamespace(module=plain), words).generate(
        request_(), sampling
    )
    ours = TritonRollout(engine, words).generate(request_(), sampling)
    width = ours.seq_len
    assert torch.equal(ours.input_ids, theirs.input_ids[:, :width])
    assert torch.equal(ours.attention_mask, theirs.attention_mask[:, :width])
    assert torch.equal(ours.response_start_idx, theirs.response_start_idx)
    for name in ("input_ids", "attention_mask", "response_start_idx"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    # DeepSpeed decodes on to max_new_tokens; all of it is padding.
    assert not theirs.attention_mask[:, width:].any()


def test_the_models_own_repetition_penalty_holds_as_in_deepspeeds_rollout(served):
    engine, plain = served
    full = RolloutRequest(PROMPTS[1:], MASK[1:])
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)
    without = TritonRollout(engine, tokenizer()).generate(full, sampling)
    try:
        for model in (engine.module, plain):
            model.generation_config.repetition_penalty = 3.0
        theirs = HybridEngineRollout(SimpleNamespace(module=plain), tokenizer()).generate(
            full, sampling
        )
        ours = TritonRollout(engine, tokenizer()).generate(full, sampling)
    finally:
        for model in (engine.module, plain):
            model.generation_config.repetition_penalty = None
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert not torch.equal(ours.input_ids, without.input_ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [("no_repeat_ngram_size", 2), ("num_beams", 2), ("sequence_bias", {(5, 6): 1.0})],
)
def test_what_the_models_generation_config_asks_beyond_us_is_refused_by_name(served, name, value):
    engine, _ = served
    setattr(engine.module.generation_config, name, value)
    try:
        with pytest.raises(ValueError, match=f"generation_config.{name}"):
            TritonRollout(engine, tokenizer()).generate(request_(), SamplingConfig(4))
    finally:
        setattr(engine.module.generation_config, name, None)


def test_top_k_and_top_p_filter_what_is_sampled_from(served):
    engine, plain = served
    rollout = TritonRollout(engine, tokenizer())
    for sampling in (
        SamplingConfig(max_new_tokens=4, top_k=1),
        SamplingConfig(max_new_tokens=4, top_p=1e-6, top_k=0),
    ):
        batch = rollout.generate(request_(), sampling)
        for row in range(2):
            assert batch.input_ids[row, 5:].tolist() == greedy(plain, row, 4)
        # One token is left to sample from.
        assert (batch.logprobs == 0).all()
        assert (batch.raw_logprobs[:, 5:] < 0).all()


def test_a_sampled_pad_token_is_attended_like_any_other(served):
    engine, plain = served
    pad = greedy(plain, 1, 6)[2]
    batch = TritonRollout(engine, tokenizer(pad=pad)).generate(
        request_(), SamplingConfig(max_new_tokens=6, temperature=0.0)
    )
    assert batch.input_ids[1, 7] == pad
    assert batch.attention_mask[:, 5:].tolist() == [[1] * 6] * 2


def test_continuous_batch_size_bounds_the_rows_in_flight_and_changes_no_token(served):
    engine, _ = served
    rollout = TritonRollout(engine, tokenizer())
    settings = {"max_new_tokens": 4, "temperature": 0.0, "n_samples_per_prompt": 4}
    free = rollout.generate(request_(), SamplingConfig(**settings))
    steps = engine.stats.num_decode_steps
    bounded = rollout.generate(request_(), SamplingConfig(**settings, continuous_batch_size=2))
    assert torch.equal(bounded.input_ids, free.input_ids)
    assert torch.equal(bounded.attention_mask, free.attention_mask)
    # A decode step gives each row in flight a token; the first came with the prompt.
    assert steps * 8 == engine.stats.num_decode_steps * 2 == 8 * 3
    rollout.generate(request_(), SamplingConfig(**settings))
    assert engine.stats.num_decode_steps == steps


@pytest.mark.parametrize("continuous_batch_size", [None, 2])
def test_outputs_take_the_prompts_dtype_and_deepspeeds_masks(served, continuous_batch_size):
    batch = TritonRollout(served[0], tokenizer()).generate(
        RolloutRequest(PROMPTS.int(), MASK.bool()),
        SamplingConfig(max_new_tokens=2, continuous_batch_size=continuous_batch_size),
    )
    assert batch.input_ids.dtype == torch.int32
    assert batch.input_ids.device == PROMPTS.device
    # DeepSpeed's default mode builds an integer mask, its continuous mode extends the request's.
    is_default = continuous_batch_size is None
    assert batch.attention_mask.dtype == (torch.int64 if is_default else torch.bool)
    assert batch.attention_mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert batch.response_start_idx.dtype == torch.int64
    assert batch.logprobs.dtype == batch.raw_logprobs.dtype == torch.float32
    assert not batch.logprobs.requires_grad


def test_no_prompts_give_an_empty_batch_that_deepspeed_reads(served):
    batch = TritonRollout(served[0], tokenizer()).generate(
        RolloutRequest(PROMPTS[:0], MASK[:0]),
        SamplingConfig(max_new_tokens=2, n_samples_per_prompt=3, continuous_batch_size=2),
    )
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.logprobs.shape == (0, 5)
    assert ResponseTokenBatch.from_rollout(batch).target_ids.shape == (0, 4)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("max_new_tokens", 0, "max_new_tokens"),
        ("max_new_tokens", -1, "max_new_tokens"),
        ("temperature", float("nan"), "temperature"),
        ("top_p", 1.5, "top_p"),
        ("n_samples_per_prompt", 0, "n_samples_per_prompt"),
        ("continuous_batch_size", 0, "continuous_batch_size"),
    ],
)
def test_a_sampling_value_out_of_range_is_a_value_error_by_name(served, setting, value, words):
    sampling = dataclasses.replace(SamplingConfig(max_new_tokens=2), **{setting: value})
    with pytest.raises(ValueError, match=words):
        TritonRollout(served[0], tokenizer()).generate(request_(), sampling)


def test_a_prompt_without_tokens_is_a_value_error_and_costs_the_engine_nothing(served):
    engine, plain = served
    rollout = TritonRollout(engine, tokenizer())
    sampling = SamplingConfig(max_new_tokens=3, temperature=0.0, continuous_batch_size=1)
    empty = MASK.clone()
    empty[1] = 0
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        rollout.generate(RolloutRequest(PROMPTS, empty), sampling)
    batch = rollout.generate(request_(), dataclasses.replace(sampling, continuous_batch_size=None))
    assert batch.input_ids[1, 5:].tolist() == greedy(plain, 1, 3)
    assert engine.stats.num_decode_steps == 2, "both rows at once: the bound has gone"


def test_shutdown_gives_the_cache_back_and_a_later_call_takes_it_anew(served):
    engine, plain = served
    rollout = TritonRollout(engine, tokenizer())
    sampling = SamplingConfig(max_new_tokens=3, temperature=0.0)
    rollout.generate(request_(), sampling)
    generation = engine._tritonhybrid.generation
    assert generation.cache is not None
    rollout.shutdown()
    assert generation.cache is None
    assert rollout.generate(request_(), sampling).input_ids[0, 5:].tolist() == greedy(plain, 0, 3)


def test_an_engine_that_is_not_wrapped_is_refused_and_may_be_unwrapped_before_shutdown(served):
    _, plain = served
    engine = build_engine(copy.deepcopy(plain), LocalEngineConfig(zero_stage=0))
    with pytest.raises(EngineStateError, match=r"tritonhybrid\.wrap\(engine\) first"):
        TritonRollout(engine, tokenizer())
    rollout = TritonRollout(tritonhybrid.wrap(engine), tokenizer())
    before = rollout.generate(request_(), SamplingConfig(max_new_tokens=3, temperature=0.0))
    assert before.input_ids[0, 5:].tolist() == greedy(plain, 0, 3)
    tritonhybrid.unwrap(engine)
    rollout.shutdown()
    engine.destroy()


def test_the_tokenizer_is_read_at_each_call(served):
    engine, plain = served
    words = tokenizer()
    rollout = TritonRollout(engine, words)
    words.eos_token_id = greedy(plain, 0, 1)[0]
    batch = rollout.generate(
        RolloutRequest(PROMPTS[:1], MASK[:1]), SamplingConfig(max_new_tokens=5, temperature=0.0)
    )
    assert batch.input_ids[0, 5:].tolist() == [words.eos_token_id]


def test_a_tokenizer_without_pad_and_eos_is_a_value_error(served):
    with pytest.raises(ValueError, match="pad_token_id"):
        TritonRollout(served[0], tokenizer(pad=None, eos=None))
