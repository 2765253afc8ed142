"""attach gives a trainer of TRL's shape the engine's rollouts, or says why not."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

import tritonhybrid
from tritonhybrid import ConfigError, EngineStateError, HybridEngine
from tritonhybrid.local_engine import LocalEngineConfig, build_engine
from tritonhybrid.trl import TrlRollout

PROMPTS = ["5 6 7", "5 6 7", "5 6 7", "8 9 10 11 12"]


class Trainer:
    """What of TRL 1.16's GRPOTrainer attach and the rollout function look at."""

    def __init__(self, engine, **settings):
        self.accelerator = SimpleNamespace(device=torch.device("cpu"))
        self.is_deepspeed_enabled = True
        self.model_wrapped = engine
        self.rollout_func = None
        self.tools = []
        self.environment_factories = None
        self._is_vlm = False
        self.use_vllm = False
        self.use_transformers_continuous_batching = False
        asked = {
            "max_new_tokens": 6,
            "do_sample": True,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": [1, 2],
            "temperature": 0.8,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": None,
            "repetition_penalty": 1.0,
            "cache_implementation": None,
        }
        self.generation_config = GenerationConfig(**asked | settings)

    def _tokenize_prompts(self, prompts):
        images = [None] if any("image" in prompt for prompt in prompts) else None
        return [[int(word) for word in prompt.split()] for prompt in prompts], images, {}

    def generate(self, prompts):
        """As TRL's ``_generate`` calls what it was given."""
        output = self.rollout_func(copy.deepcopy(prompts), self)
        assert not {"prompt_ids", "completion_ids", "logprobs"} - output.keys()
        return output["prompt_ids"], output["completion_ids"], output["logprobs"]


def truth(plain, prompt, completion, temperature):
    with torch.no_grad():
        logits = plain(torch.tensor([prompt + completion])).logits[0].double() / temperature
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return [
        logits[place].log_softmax(-1)[token].item()
        for place, token in zip(places, completion, strict=True)
    ]


def test_attach_wraps_the_trainers_engine_in_place_and_plugs_the_rollout_in(served):
    _, plain = served
    engine = build_engine(copy.deepcopy(plain), LocalEngineConfig(zero_stage=0))
    trainer = Trainer(engine)
    attached = tritonhybrid.trl.attach(trainer, config={"max_num_seqs": 4})
    assert attached is engine is trainer.model_wrapped
    assert isinstance(engine, HybridEngine)
    assert engine.hybrid_config.max_num_seqs == 4
    assert isinstance(trainer.rollout_func, TrlRollout)
    # train() may begin more than once.
    assert tritonhybrid.trl.attach(trainer) is engine
    with pytest.raises(EngineStateError, match="Pass the config where"):
        tritonhybrid.trl.attach(trainer, config={"max_num_seqs": 4})
    tritonhybrid.unwrap(engine)
    with pytest.raises(EngineStateError, match=r"attach\(trainer\) again"):
        trainer.generate(PROMPTS)
    engine.destroy()


def test_each_prompt_gets_one_completion_with_the_logprobs_it_was_sampled_with(served):
    engine, plain = served
    trainer = Trainer(engine)
    tritonhybrid.trl.attach(trainer)
    rounds = [trainer.generate(PROMPTS) for _ in range(4)]
    for prompt_ids, completion_ids, logprobs in rounds:
        assert prompt_ids == [[5, 6, 7]] * 3 + [[8, 9, 10, 11, 12]]
        for prompt, completion, ours in zip(prompt_ids, completion_ids, logprobs, strict=True):
            assert ours == pytest.approx(truth(plain, prompt, completion, 0.8), abs=2e-4)
            assert not {1, 2} & set(completion[:-1])
            assert len(completion) == 6 or completion[-1] in (1, 2)
    # The copies of a prompt, and its later rounds, are samples of their own.
    assert len({tuple(row) for _, rows, _ in rounds for row in rows[:3]}) > 6
    # A prompt that TRL repeats is computed once.
    assert engine.stats.prefill_tokens < sum(map(len, rounds[0][0])) - 3


def test_the_trainers_settings_hold_over_the_models_own(served):
    engine, plain = served
    trainer = Trainer(engine, do_sample=False, eos_token_id=None)
    try:
        for model in (engine.module, plain):
            model.generation_config.repetition_penalty = 4.0
        # The trainer's 1.0 counts.
        tritonhybrid.trl.attach(trainer)
        (ids,), (completion,), _ = trainer.generate(PROMPTS[3:])
        expected = plain.generate(
            torch.tensor([ids]), generation_config=copy.deepcopy(trainer.generation_config)
        )
        assert completion == expected[0, len(ids) :].tolist()
        # The trainer says nothing, so the model's counts.
        trainer.generation_config.repetition_penalty = None
        _, (penalised,), _ = trainer.generate(PROMPTS[3:])
        expected = plain.generate(
            torch.tensor([ids]), generation_config=copy.deepcopy(trainer.generation_config)
        )
        assert penalised == expected[0, len(ids) :].tolist() != completion
    finally:
        for model in (engine.module, plain):
            model.generation_config.repetition_penalty = None


def test_where_no_config_names_top_k_hugging_faces_default_holds(served):
    # 29 tokens are fewer than its 50, so a bound of 50 must show in the parameters.
    from tritonhybrid.integrations.generation_config import sampling_params

    assert sampling_params(GenerationConfig(do_sample=True, max_new_tokens=2)).top_k == 50
    assert sampling_params(GenerationConfig(do_sample=True, top_k=0, max_new_tokens=2)).top_k == 0


def own_rollout(prompts, trainer):
    return {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": [print]}, "after each tool"),
        ({"environment_factories": {None: object}}, "after each tool"),
        ({"_is_vlm": True}, "may hold images"),
        ({"rollout_func": own_rollout}, "a rollout_func of its own"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "generation_config.num_beams"),
    ],
)
def test_what_the_rollout_cannot_stand_in_for_is_left_to_module_generate(
    served, caplog, change, reason
):
    engine, plain = served
    trainer = Trainer(engine)
    for name, value in change.items():
        setattr(trainer, name, value)
    with caplog.at_level(logging.WARNING, "tritonhybrid"):
        tritonhybrid.trl.attach(trainer)
    assert "module.generate serves this trainer" in caplog.text
    assert reason in caplog.text
    assert trainer.rollout_func is change.get("rollout_func")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        trainer.model_wrapped.module.generate(ids, max_new_tokens=4, do_sample=False),
        LlamaForCausalLM.generate(plain, ids, max_new_tokens=4, do_sample=False),
    )
    assert engine.stats.path == "fused"


def test_a_trainer_without_rollout_func_is_left_to_module_generate(served, caplog):
    trainer = Trainer(served[0])
    del trainer.rollout_func
    with caplog.at_level(logging.WARNING, "tritonhybrid"):
        assert tritonhybrid.trl.attach(trainer) is served[0]
    assert "Trainer has no rollout_func" in caplog.text
    assert not hasattr(trainer, "rollout_func")


def test_images_are_refused_where_they_turn_up(served):
    trainer = Trainer(served[0])
    trainer._tokenize_prompts = lambda prompts: ([[5]], [["picture"]], {})
    tritonhybrid.trl.attach(trainer)
    with pytest.raises(ConfigError, match="prompts with images"):
        trainer.generate(["5"])


def test_before_training_begins_the_error_says_when_to_attach(served):
    with pytest.raises(EngineStateError, match="on_train_begin"):
        tritonhybrid.trl.attach(Trainer(served[1]))


def test_a_trainer_without_deepspeed_is_refused(served):
    trainer = Trainer(served[1])
    trainer.is_deepspeed_enabled = False
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM without DeepSpeed.*deepspeed=\.\.\."):
        tritonhybrid.trl.attach(trainer)


def test_what_is_no_trainer_is_refused_and_told_of_wrap(served):
    with pytest.raises(ConfigError, match=r"HybridDeepSpeedEngine.*tritonhybrid\.wrap\(engine\)"):
        tritonhybrid.trl.attach(served[0])


@pytest.mark.parametrize("name", ["use_vllm", "use_transformers_continuous_batching"])
def test_a_trainer_told_to_generate_elsewhere_is_refused_by_name(served, name):
    trainer = Trainer(served[0])
    setattr(trainer, name, True)
    with pytest.raises(ConfigError, match=f"expected {name}=False"):
        tritonhybrid.trl.attach(trainer)
