"""PEFT models: adapters called as modules, unmerged; Hugging Face's tokens with each adapter."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from family_zoo import build
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

from tritonhybrid import SamplingParams, UnsupportedModelError
from tritonhybrid.testing import check_family, hold

PROMPTS = [[5, 6, 7, 8, 9], [10] * 20, [11, 12], [13] * 17]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)

TARGETS: dict[str, Any] = {
    "q_v": ["q_proj", "v_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all_linear": "all-linear",
    "head": ["o_proj", "lm_head"],
}


def randomise(model: Any) -> Any:
    """LoRA starts with B = 0, which changes nothing; give it a say."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "prompt_encoder" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def lora(family: str, targets: Any, **settings: Any) -> Any:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type=TaskType.CAUSAL_LM, **settings
    )
    return randomise(get_peft_model(build(family), config))


def hf_tokens(model: Any) -> list[list[int]]:
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def our_tokens(engine: Any) -> list[list[int]]:
    return [completion.token_ids for completion in engine.rollout(PROMPTS, GREEDY).completions]


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_gives_hugging_faces_tokens_and_changes_them(targets: str):
    model = lora("llama", TARGETS[targets])
    check_family(model, max_new_tokens=8, path="fused")
    assert our_tokens(hold(model)) != our_tokens(hold(build("llama")))


def test_lora_on_a_generic_family_gives_hugging_faces_tokens():
    check_family(lora("gemma2", "all-linear"), max_new_tokens=8, path="generic")


def test_lora_with_trained_embeddings_and_head_gives_hugging_faces_tokens():
    model = lora("llama", ["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    check_family(model, max_new_tokens=8)


def test_dora_gives_hugging_faces_tokens():
    check_family(lora("llama", "all-linear", use_dora=True), max_new_tokens=8)


def test_a_disabled_adapter_gives_the_base_models_tokens():
    model = lora("llama", "all-linear")
    engine = hold(model)
    with_adapter = our_tokens(engine)
    with model.disable_adapter():
        without = our_tokens(engine)
        assert without == hf_tokens(model)
    assert without == our_tokens(hold(build("llama")))
    assert our_tokens(engine) == with_adapter != without


def test_each_of_two_adapters_gives_its_own_tokens():
    model = lora("llama", ["q_proj", "v_proj"])
    second = LoraConfig(r=2, target_modules=["o_proj", "up_proj"], task_type=TaskType.CAUSAL_LM)
    model.add_adapter("second", second)
    randomise(model)
    engine = hold(model)
    tokens = {}
    for adapter in ("default", "second", "default"):
        model.set_adapter(adapter)
        tokens[adapter] = our_tokens(engine)
        assert tokens[adapter] == hf_tokens(model)
        assert engine.stats.path == "fused"
    assert tokens["default"] != tokens["second"]


def test_a_merged_adapter_gives_the_same_tokens():
    model = lora("llama", "all-linear")
    expected = our_tokens(hold(model))
    merged = copy.deepcopy(model).merge_and_unload()
    assert our_tokens(hold(merged)) == expected


def test_lora_without_a_task_type_gives_hugging_faces_tokens():
    config = LoraConfig(r=4, target_modules="all-linear")
    model = randomise(get_peft_model(build("llama"), config))
    engine = hold(model)
    assert our_tokens(engine) == hf_tokens(model)
    ids = torch.tensor([PROMPTS[0]])
    ours = engine.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert ours[0, 5:].tolist() == hf_tokens(model)[0]


def test_alora_goes_to_hugging_faces_loop_and_begins_at_its_invocation_tokens():
    model = lora("llama", ["q_proj", "v_proj"], alora_invocation_tokens=[7, 8])
    engine = hold(model)
    tokens = our_tokens(engine)
    assert "aLoRA" in engine.stats.notes[0]
    assert tokens == hf_tokens(model)
    base = our_tokens(hold(build("llama")))
    # Only the first prompt holds the invocation tokens.
    assert tokens[0] != base[0] and tokens[1:] == base[1:]
    ids = torch.tensor([PROMPTS[0]])
    ours = engine.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert ours[0, 5:].tolist() == tokens[0]


# PEFT warns of the position_ids that HF's generate hands it, with or without us.
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_prompt_tuning_goes_to_hugging_faces_loop_with_its_virtual_tokens():
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    model = randomise(get_peft_model(build("llama"), config))
    engine = hold(model)
    out = engine.rollout(PROMPTS, GREEDY)
    assert out.stats.path == "hf"
    assert "prompt learning" in out.stats.notes[0]
    tokens = [completion.token_ids for completion in out.completions]
    assert tokens == hf_tokens(model)
    assert tokens != our_tokens(hold(build("llama")))


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_prefix_tuning_is_served_or_refused_where_transformers_ignores_the_prefix():
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    model = randomise(get_peft_model(build("llama"), config))
    engine = hold(model)
    ids = torch.tensor([PROMPTS[0]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = hf_tokens(model)
    if any("Both `past_key_values` and `cache`" in str(each.message) for each in caught):
        # peft 0.21.2 with transformers 5.24: HF's own tokens are the base model's.
        assert theirs == our_tokens(hold(build("llama")))
        with pytest.raises(UnsupportedModelError, match="prefix"):
            engine.rollout(PROMPTS, GREEDY)
        with pytest.raises(UnsupportedModelError, match="prefix"):
            engine.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    else:
        assert our_tokens(engine) == theirs != our_tokens(hold(build("llama")))
