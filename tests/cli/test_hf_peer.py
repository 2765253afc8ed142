import pytest
import torch
from transformers import LlamaForCausalLM

from tritonhybrid.errors import ConfigError
from tritonhybrid.hf_peer import Agreement, HfPeer, Speed, cut_after_end
from tritonhybrid.sampling_params import SamplingParams

PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 30, 31, 32, 33, 34]]


@pytest.fixture(scope="module")
def model(model_dir) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_dir).eval()


def greedy_by_hand(model: LlamaForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_each_prompt_alone(model: LlamaForCausalLM):
    params = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    got = HfPeer(model).generate(PROMPTS, params)
    assert got == [greedy_by_hand(model, prompt, 6) for prompt in PROMPTS]


def test_completions_end_with_their_first_end_token(model: LlamaForCausalLM):
    free = HfPeer(model).generate(
        PROMPTS[:1], SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    )[0]
    params = SamplingParams(max_new_tokens=6, temperature=0.0, stop_token_ids=[free[2]])
    assert HfPeer(model).generate(PROMPTS[:1], params) == [free[: free.index(free[2]) + 1]]


def test_samples_of_a_prompt_are_adjacent(model: LlamaForCausalLM):
    torch.manual_seed(0)
    params = SamplingParams(max_new_tokens=4, n=3, top_k=1, ignore_eos=True)
    got = HfPeer(model).generate(PROMPTS, params)
    assert got == [greedy_by_hand(model, prompt, 4) for prompt in PROMPTS for _ in range(3)]


def test_settings_it_does_not_translate_are_refused_by_name(model: LlamaForCausalLM):
    with pytest.raises(ConfigError, match="min_p, seed"):
        HfPeer(model).generate(PROMPTS, SamplingParams(min_p=0.1, seed=3))
    with pytest.raises(ConfigError, match="frequency_penalty, logit_bias, forced_bos_token_id"):
        params = SamplingParams(logit_bias={3: 1.0}, forced_bos_token_id=0, frequency_penalty=0.1)
        HfPeer(model).generate(PROMPTS, params)


def test_timed_calls_count_tokens_and_seconds(model: LlamaForCausalLM):
    speed = Speed()
    params = SamplingParams(max_new_tokens=5, temperature=0.0, ignore_eos=True)
    HfPeer(model).timed(PROMPTS, params, speed)
    HfPeer(model).timed(PROMPTS, params, speed)
    assert speed.num_tokens == 30
    assert speed.tokens_per_s == pytest.approx(30 / speed.seconds)


def test_the_end_token_stays_and_what_follows_goes():
    assert cut_after_end([5, 2, 7, 2], [2]) == [5, 2]
    assert cut_after_end([5, 7], [2]) == [5, 7]


def test_agreement_counts_missing_positions_as_unequal():
    equal = Agreement.between([[1, 2, 3], [4]], [[1, 9], [4]])
    assert (equal.num_equal, equal.num_tokens) == (2, 4)
