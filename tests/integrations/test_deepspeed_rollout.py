"""TritonRollout keeps DeepSpeed's rollout contract to the letter."""

import copy
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.rollout import (
    ResponseTokenBatch,
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    SamplingConfig,
)
from transformers import LlamaConfig, LlamaForCausalLM

import tritonhybrid
from tritonhybrid import TritonRollout
from tritonhybrid.local_engine import LocalEngineConfig, build_engine

PAD = 0
PROMPTS = torch.tensor([[PAD, PAD, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def served():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=29,
            initializer_range=0.2,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    plain = copy.deepcopy(model).eval()
    engine = tritonhybrid.wrap(build_engine(model, LocalEngineConfig(zero_stage=3)))
    yield engine, plain
    tritonhybrid.unwrap(engine)
    engine.destroy()


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


def test_deepspeeds_own_target_builder_consumes_the_batch(served):
    engine, _ = served
    batch = TritonRollout(engine, tokenizer(eos=1)).generate(
        request_(), SamplingConfig(max_new_tokens=4, temperature=1.0)
    )
    targets = ResponseTokenBatch.from_rollout(batch)
    assert int(targets.response_mask.sum()) == int(batch.attention_mask[:, 5:].sum())
    assert targets.target_ids[targets.response_mask].tolist() == (
        batch.input_ids[:, 5:][batch.attention_mask[:, 5:].bool()].tolist()
    )


def test_a_tokenizer_without_pad_and_eos_is_a_value_error(served):
    with pytest.raises(ValueError, match="pad_token_id"):
        TritonRollout(served[0], tokenizer(pad=None, eos=None))
