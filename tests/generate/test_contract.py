"""``docs/generate.md`` row by row: the way each argument goes, and Hugging Face's answer to it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers.generation.utils
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import TransformersKwargs

from tritonhybrid import ConfigError
from tritonhybrid.containers.parts import cache_name

DOCUMENT = Path(__file__).parents[2] / "docs" / "generate.md"
WAYS = {"native": ("fused", "generic"), "HF's loop": ("hf",)}
BASE = {"max_new_tokens": 6, "do_sample": False}
PROMPTS = [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19, 20, 21, 22, 23], [11, 12]]
WIDTH = max(map(len, PROMPTS))


def documented() -> dict[str, str]:
    """The way of each row, by its first cell."""
    text = DOCUMENT.read_text()
    inside = text.split("<!-- generate-contract -->")[1].split("<!-- /generate-contract -->")[0]
    rows = re.findall(r"^\| (.+?) \| (native|HF's loop|refused) \|", inside, re.MULTILINE)
    assert len(dict(rows)) == len(rows), "a row stands twice"
    return dict(rows)


ROWS = documented()
# The first backticked word of a row that is no way of calling.
ARGUMENTS = {m[1] for row in ROWS if (m := re.match(r"`(\w+)`", row))}


def installed() -> set[str]:
    """What the installed transformers' generate accepts for a Llama, by name."""
    names = set(signature(GenerationMixin.generate).parameters)
    names |= {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    names |= set(signature(LlamaForCausalLM.forward).parameters)
    names |= set(TransformersKwargs.__optional_keys__)
    return names - {"self", "kwargs"}


def test_every_argument_of_the_installed_transformers_has_a_row():
    missing = sorted(installed() - ARGUMENTS)
    assert not missing, (
        f"transformers {transformers.__version__} accepts what docs/generate.md has no row for: "
        f"{missing}. Find out what each does to HF's tokens, see that hf_generate._not_served "
        "sends it to HF's loop or serve it, and give it a row there and a case here."
    )


class Favour(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 42] += 50
        return scores


class AfterTwo(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= WIDTH + 2)


class Collector(BaseStreamer):
    """Writes down what it is given; equal to one that was given the same."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.values.append((value.tolist(), value.dtype))

    def end(self) -> None:
        self.values.append("end")


class Words:
    """As much of a tokenizer as HF's stop strings need: token i is one letter."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def get_vocab(self) -> dict[str, int]:
        return {chr(0x4E00 + i): i for i in range(101)}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


class CoarseCache(DynamicCache):
    """In place of the quantized cache, whose back ends are no dependency of ours."""

    def __init__(self, backend: str, config: Any, nbits: int = 4) -> None:
        super().__init__(config=config)
        self._step = 2.0 ** (2 - nbits)

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = ((each / self._step).round() * self._step for each in (key, value))
        return super().update(*rounded, *args, **kwargs)


def no_sampling(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    assert not hasattr(model, "no_such_attribute")
    return torch.cat([input_ids, input_ids[:, :2]], dim=1)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of as many letters as the model has tokens."""
    vocabulary = {chr(0x4E00 + index): index for index in range(101)}
    # An extension of the last prompt token, for healing to weigh.
    vocabulary[chr(0x4E00 + 23) + "x"] = vocabulary.pop(chr(0x4E00 + 24))
    model = tokenizers.models.WordLevel(vocabulary, unk_token=chr(0x4E00))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=chr(0x4E01), pad_token=chr(0x4E00)
    )


@dataclass
class World:
    """What the arguments of a case are made of."""

    model: Any
    assistant: Any
    # [3, 6] greedy tokens.
    greedy: list[list[int]]
    # Left-padded [3, 9] ids and their mask.
    ids: torch.Tensor
    mask: torch.Tensor


@dataclass
class Case:
    """One real value of an argument.

    Args:
        arguments: Makes a call's arguments afresh.
        rows: Prompts to call with; 0 calls without ids.
        changes: Whether the answer is another than without the argument.
        names: What a refusal names, if not the argument.
        base: What the arguments come on top of.
        raises: Whether HF answers with an error too.
    """

    arguments: Callable[[World], dict[str, Any]]
    rows: int = 3
    changes: bool = True
    names: str = ""
    base: dict[str, Any] = field(default_factory=lambda: BASE)
    raises: bool = False


def given(changes: bool = True, **arguments: Any) -> Case:
    return Case(lambda world: dict(arguments), changes=changes)


def drawn(changes: bool = False, **arguments: Any) -> Case:
    """Sampling that leaves one token a step, so that no noise matters."""
    return given(changes, do_sample=True, **arguments)


def seeded(**arguments: Any) -> Case:
    """Sampling on HF's loop, whose noise torch.manual_seed repeats."""
    return given(do_sample=True, **arguments)


def beams(**arguments: Any) -> Case:
    """Beams of which many end early."""
    return given(num_beams=3, eos_token_id=list(range(3, 60)), **arguments)


def assisted(**arguments: Any) -> Case:
    return Case(
        lambda world: {"assistant_model": world.assistant, **arguments}, rows=1, changes=False
    )


def guided(world: World) -> dict[str, Any]:
    return {
        "guidance_scale": 3.0,
        "negative_prompt_ids": world.ids.flip(1),
        "negative_prompt_attention_mask": world.mask.flip(1),
    }


def filled_cache(world: World, name: str) -> dict[str, Any]:
    cache = DynamicCache(config=world.model.config)
    with torch.no_grad():
        world.model(
            input_ids=world.ids[1:2, :-3] + 1, use_cache=True, **{cache_name(world.model): cache}
        )
    return {"input_ids": world.ids[1:2], name: cache}


def forced(world: World) -> list[int]:
    return sorted({row[2] for row in world.greedy})


def embedded(world: World) -> dict[str, Any]:
    return {"inputs_embeds": world.model.get_input_embeddings()(world.ids[1:2]).detach()}


def with_holes(world: World) -> torch.Tensor:
    mask = world.mask.clone()
    mask[1, 3:7] = 0
    return mask


def own_positions(world: World) -> torch.Tensor:
    return torch.arange(WIDTH).mul(3).expand_as(world.ids)


CASES: dict[str, Case] = {
    "`inputs`": Case(lambda w: {"inputs": w.ids, "attention_mask": w.mask}, rows=0),
    "`generation_config`": Case(
        lambda w: {"generation_config": GenerationConfig(**BASE, pad_token_id=3)}, base={}
    ),
    "`logits_processor`": given(logits_processor=LogitsProcessorList([Favour()])),
    "`stopping_criteria`": given(stopping_criteria=StoppingCriteriaList([AfterTwo()])),
    "`prefix_allowed_tokens_fn`": given(prefix_allowed_tokens_fn=lambda row, ids: [5, 6 + row]),
    "`synced_gpus`": given(False, synced_gpus=True),
    "`assistant_model`": assisted(),
    "`streamer`, one row": Case(lambda w: {"streamer": Collector()}, rows=1, changes=False),
    "`streamer`, several rows": Case(lambda w: {"streamer": Collector()}, changes=False),
    "`negative_prompt_ids`": Case(guided),
    "`negative_prompt_attention_mask`": Case(guided),
    "`custom_generate`, a function": given(custom_generate=no_sampling),
    "`custom_generate`, a repository": Case(
        lambda w: {"custom_generate": "nobody/nothing"}, raises=True, names="nobody/nothing"
    ),
    "`input_ids`": Case(lambda w: {"input_ids": w.ids, "attention_mask": w.mask}, rows=0),
    "`attention_mask`, left-padded": Case(
        lambda w: {"input_ids": w.ids + 1, "attention_mask": w.mask}, rows=0
    ),
    "`attention_mask`, with holes": Case(lambda w: {"attention_mask": with_holes(w)}),
    "`position_ids`, the default ones": Case(
        lambda w: {"position_ids": (w.mask.cumsum(1) - 1).clamp(min=0)}, changes=False
    ),
    "`position_ids`, others": Case(lambda w: {"position_ids": own_positions(w)}),
    "`inputs_embeds`": Case(embedded, rows=0),
    "`cache`": Case(lambda w: filled_cache(w, "cache"), rows=0),
    "`past_key_values`": Case(lambda w: filled_cache(w, "past_key_values"), rows=0),
    "`logits_to_keep`": given(False, logits_to_keep=2),
    "`labels`": Case(lambda w: {"labels": w.ids}, changes=False),
    "`tokenizer`": given(False, tokenizer=Words()),
    "`assistant_tokenizer`": Case(
        lambda w: {"assistant_model": w.assistant, "assistant_tokenizer": Words()},
        rows=1,
        raises=True,
    ),
    "`trust_remote_code`": given(False, trust_remote_code=True),
    "`adapter_names`": Case(lambda w: {"adapter_names": ["one"]}, raises=True),
    "`alora_offsets`": Case(lambda w: {"alora_offsets": [1]}, raises=True),
    "`num_items_in_batch`": given(False, num_items_in_batch=torch.tensor(3)),
    "`output_router_logits`": given(False, output_router_logits=True),
    "`cu_seq_lens_q`": given(False, cu_seq_lens_q=torch.tensor([0, WIDTH])),
    "`cu_seq_lens_k`": given(False, cu_seq_lens_k=torch.tensor([0, WIDTH])),
    "`max_length_q`": given(False, max_length_q=WIDTH),
    "`max_length_k`": given(False, max_length_k=WIDTH),
    "`is_causal`": given(False, is_causal=True),
    "`seq_idx`": given(False, seq_idx=torch.zeros(1, WIDTH, dtype=torch.int32)),
    "`token_type_ids`": Case(lambda w: {"token_type_ids": w.ids}, raises=True),
    "`max_length`": Case(lambda w: {"max_length": WIDTH + 4}, base={"do_sample": False}),
    "`max_new_tokens`": given(max_new_tokens=4),
    "`min_length`": Case(lambda w: {"min_length": WIDTH + 6, "eos_token_id": forced(w)}),
    "`min_new_tokens`": Case(lambda w: {"min_new_tokens": 6, "eos_token_id": forced(w)}),
    "`early_stopping`": beams(early_stopping=True, length_penalty=5.0),
    "`max_time`": given(max_time=1e-9),
    "`stop_strings`": Case(
        lambda w: {"stop_strings": [chr(0x4E00 + w.greedy[0][1])], "tokenizer": Words()}
    ),
    "`do_sample`": drawn(top_k=1),
    "`num_beams`": beams(),
    "`use_mtp`": Case(lambda w: {"use_mtp": True}, rows=1, raises=True),
    "`use_cache`": given(False, use_cache=False),
    "`cache_implementation`, a dynamic or static one": given(False, cache_implementation="static"),
    '`cache_implementation`, `"quantized"`': given(cache_implementation="quantized"),
    '`cache_implementation`, `"paged"`': given(cache_implementation="paged"),
    "`cache_config`": given(cache_implementation="quantized", cache_config={"nbits": 2}),
    "`max_cache_len`": given(False, cache_implementation="static", max_cache_len=50),
    "`temperature`": drawn(True, temperature=1e-4, top_k=0),
    "`top_k`": drawn(True, top_k=1),
    "`top_p`": drawn(True, top_p=1e-6, top_k=0),
    "`min_p`": drawn(True, min_p=1.0, top_k=0),
    "`top_h`": seeded(top_h=0.4),
    "`typical_p`": seeded(typical_p=0.5),
    "`epsilon_cutoff`": seeded(epsilon_cutoff=0.02),
    "`eta_cutoff`": seeded(eta_cutoff=0.3),
    "`repetition_penalty`": given(repetition_penalty=3.0),
    "`encoder_repetition_penalty`": given(encoder_repetition_penalty=5.0),
    "`length_penalty`": beams(length_penalty=-3.0),
    "`no_repeat_ngram_size`": given(no_repeat_ngram_size=1),
    "`bad_words_ids`": Case(lambda w: {"bad_words_ids": [[token] for token in forced(w)]}),
    "`renormalize_logits`": given(
        renormalize_logits=True, output_scores=True, return_dict_in_generate=True
    ),
    "`forced_bos_token_id`": Case(
        lambda w: {"input_ids": torch.tensor([[14], [9]]), "forced_bos_token_id": 33}, rows=0
    ),
    "`forced_eos_token_id`": given(forced_eos_token_id=55),
    "`remove_invalid_values`": given(False, remove_invalid_values=True),
    "`exponential_decay_length_penalty`": given(exponential_decay_length_penalty=(1, 20.0)),
    "`suppress_tokens`": Case(lambda w: {"suppress_tokens": forced(w)}),
    "`begin_suppress_tokens`": Case(
        lambda w: {"begin_suppress_tokens": [row[0] for row in w.greedy]}
    ),
    "`sequence_bias`, single tokens": given(sequence_bias={(33,): 50.0}),
    "`sequence_bias`, several tokens": Case(
        lambda w: {"sequence_bias": {tuple(w.greedy[0][:2]): -50.0}}
    ),
    "`token_healing`": Case(
        lambda w: {"token_healing": True, "tokenizer": letters()}, rows=1, changes=False
    ),
    "`guidance_scale`": given(guidance_scale=3.0),
    "`watermarking_config`": given(watermarking_config=WatermarkingConfig(bias=30.0)),
    "`num_return_sequences`": drawn(changes=True, top_k=1, num_return_sequences=2),
    "`output_attentions`": given(output_attentions=True, return_dict_in_generate=True),
    "`output_hidden_states`": given(output_hidden_states=True, return_dict_in_generate=True),
    "`output_scores`": given(
        output_scores=True, return_dict_in_generate=True, repetition_penalty=2.0
    ),
    "`output_logits`": given(
        output_logits=True, return_dict_in_generate=True, repetition_penalty=2.0
    ),
    "`return_dict_in_generate`": given(False, return_dict_in_generate=True),
    "`pad_token_id`": Case(lambda w: {"pad_token_id": 77, "eos_token_id": w.greedy[0][2]}),
    "`bos_token_id`": Case(lambda w: {"bos_token_id": 7}, rows=0),
    "`eos_token_id`": Case(lambda w: {"eos_token_id": forced(w)}),
    "`encoder_no_repeat_ngram_size`": Case(
        lambda w: {"input_ids": torch.tensor(w.greedy), "encoder_no_repeat_ngram_size": 1}, rows=0
    ),
    "`decoder_start_token_id`": given(False, decoder_start_token_id=7),
    "`is_assistant`": given(False, is_assistant=True, assistant_confidence_threshold=0.0),
    "`num_assistant_tokens`": assisted(num_assistant_tokens=2),
    "`num_assistant_tokens_schedule`": assisted(num_assistant_tokens_schedule="heuristic"),
    "`assistant_confidence_threshold`": assisted(assistant_confidence_threshold=0.9),
    "`prompt_lookup_num_tokens`": Case(
        lambda w: {"prompt_lookup_num_tokens": 2}, rows=1, changes=False
    ),
    "`max_matching_ngram_size`": Case(
        lambda w: {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1},
        rows=1,
        changes=False,
    ),
    "`assistant_early_exit`": Case(lambda w: {"assistant_early_exit": 1}, rows=1, changes=False),
    "`assistant_lookbehind`": assisted(assistant_lookbehind=3),
    "`target_lookbehind`": assisted(target_lookbehind=3),
    "`assistant_ensemble_weight`": assisted(assistant_ensemble_weight=0.9),
    "`speculation_type`": Case(
        lambda w: {"assistant_model": w.assistant, "speculation_type": "dflash"},
        rows=1,
        raises=True,
    ),
    "`compile_config`": given(False, compile_config=transformers.CompileConfig()),
    "`disable_compile`": given(False, disable_compile=True),
    "`continuous_batching_config`": given(False, continuous_batching_config={"block_size": 16}),
    "`low_memory`": given(False, low_memory=True),
    "`penalty_alpha`": Case(
        lambda w: {"penalty_alpha": 0.6, "top_k": 4}, raises=True, names="Contrastive Search"
    ),
    "`dola_layers`": Case(lambda w: {"dola_layers": "low"}, raises=True, names="Dola Generation"),
    "`diversity_penalty`": Case(
        lambda w: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        raises=True,
        names="Group Beam Search",
    ),
    "`num_beam_groups`": Case(
        lambda w: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        raises=True,
        names="Group Beam Search",
    ),
    "`constraints`": Case(
        lambda w: {"num_beams": 2, "constraints": [object()]},
        raises=True,
        names="Constrained Beam Search",
    ),
    "`force_words_ids`": Case(
        lambda w: {"num_beams": 2, "force_words_ids": [[5]]},
        raises=True,
        names="Constrained Beam Search",
    ),
    "`prefill_chunk_size`": given(False, prefill_chunk_size=4),
    "`transformers_version`": given(False, transformers_version="5.0"),
}


@pytest.fixture
def world(engine: Any) -> World:
    torch.manual_seed(1)
    ids = torch.zeros(len(PROMPTS), WIDTH, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, WIDTH - len(prompt) :] = torch.tensor(prompt)
    mask = ids.ne(0).long()
    out = GenerationMixin.generate(engine.module, ids, attention_mask=mask, **BASE)
    return World(
        model=engine.module,
        assistant=LlamaForCausalLM(engine.module.config).eval(),
        greedy=out[:, WIDTH:].tolist(),
        ids=ids,
        mask=mask,
    )


def call(generate: Callable[..., Any], world: World, case: Case) -> tuple[Any, Any]:
    """What a call answers, an error as its type and text, and what its streamer was given."""
    kwargs = {**case.base, **case.arguments(world)}
    if case.rows:
        first = 1 if case.rows == 1 else 0
        rows = slice(first, first + case.rows)
        kwargs = {"input_ids": world.ids[rows], "attention_mask": world.mask[rows]} | kwargs
    torch.manual_seed(5)
    try:
        with warnings.catch_warnings():
            # transformers 5.24's old name of `cache`.
            warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
            answer = generate(**kwargs)
    except Exception as error:
        return (type(error), str(error)), None
    streamer = kwargs.get("streamer")
    return answer, None if streamer is None else list(streamer.values)


def parts(answer: Any) -> list[Any]:
    """The tensors of an answer, or its error, in order; a returned cache is left out."""
    if isinstance(answer, torch.Tensor):
        return [answer]
    if not isinstance(answer, dict):
        return list(answer)
    found: list[Any] = []
    for name in ("sequences", "scores", "logits", "attentions", "hidden_states"):
        value = answer.get(name)
        found += [] if value is None else flat(value)
    return found


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in flat(each)]


def are_equal(one: Any, other: Any) -> bool:
    mine, theirs = parts(one), parts(other)
    return len(mine) == len(theirs) and all(
        type(a) is type(b)
        and (a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
        for a, b in zip(mine, theirs, strict=True)
    )


def test_every_row_has_a_case():
    assert set(CASES) | set(CALLS) == set(ROWS)


@pytest.mark.parametrize("row", CASES)
def test_each_row_goes_its_way_and_is_answered_as_hugging_face_does(
    engine: Any, world: World, row: str, monkeypatch: pytest.MonkeyPatch
):
    case, way = CASES[row], ROWS[row]
    name = re.match(r"`(\w+)`", row)[1]  # type: ignore[index]
    if name not in installed() and name in vars(GenerationConfig()):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    monkeypatch.setattr(transformers.generation.utils, "QuantizedCache", CoarseCache)
    if name == "output_attentions":
        # sdpa has none to return.
        monkeypatch.setattr(engine.module.config, "_attn_implementation_internal", "eager")
    ours, streamed = call(engine.generate, world, case)
    stats = engine.stats
    if "paged" in row:
        assert ours[0] is ConfigError and "cache_implementation='paged'" in ours[1]
        return
    theirs, expected = call(lambda **kwargs: hf(engine, **kwargs), world, case)
    assert are_equal(ours, theirs), (ours, theirs)
    assert streamed == expected
    assert isinstance(ours, tuple) == case.raises
    if way == "refused":
        assert (case.names or name) in ours[1]
        return
    assert stats.path in WAYS[way]
    if way == "HF's loop":
        assert stats.notes[0].startswith("HF's own decoding serves this call: ")
    elif name == "return_dict_in_generate":
        assert stats.notes == [
            "the output holds no key-value cache: ours is paged and stays with the engine"
        ]
    else:
        assert stats.notes == []
    without, _ = call(lambda **kwargs: hf(engine, **without_(kwargs, name)), world, case)
    assert case.changes != are_equal(theirs, without) or case.raises


def without_(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def hf(engine: Any, **kwargs: Any) -> Any:
    """HF's own generate on the same weights, past the wrapped one."""
    return type(engine.module).generate(engine.module, **kwargs)


def adapted(model: Any) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    adapted = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted.eval()


def dropping_out(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.attention_dropout, config._attn_implementation = 0.5, "eager"
    module = LlamaForCausalLM(config)
    module.load_state_dict(model.state_dict())
    return module.train()


def checkpointing(model: Any) -> Any:
    module = dropping_out(model)
    getattr(module, "activation_checkpointing_enable", module.gradient_checkpointing_enable)()
    return module


# How the module is made, and the call's arguments.
CALLS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "`PeftModel.generate`": (adapted, {}),
    "`PeftModel.generate` with `num_beams`": (adapted, {"num_beams": 2}),
    "Training mode: dropout": (dropping_out, {}),
    "Training mode: gradient checkpointing": (checkpointing, {}),
    "Training mode with `num_beams`": (checkpointing, {"num_beams": 2}),
}


@pytest.mark.parametrize("row", CALLS)
def test_each_way_of_calling_is_answered_as_hugging_face_does(
    model: Any, world: World, wrapped: Callable[..., Any], row: str
):
    make, arguments = CALLS[row]
    module = make(model)
    reference = copy.deepcopy(module).eval()
    trains = module.training
    engine = wrapped(module)
    engine.train(trains)
    before = [each.training for each in module.modules()]
    kwargs = {"input_ids": world.ids, "attention_mask": world.mask, **BASE, **arguments}
    ours = engine.generate(**kwargs)
    assert torch.equal(ours, engine.module.generate(**kwargs))
    assert torch.equal(ours, reference.generate(**kwargs))
    assert engine.stats.path in WAYS[ROWS[row]]
    assert any("training mode" in note for note in engine.stats.notes) == trains
    assert [each.training for each in module.modules()] == before


def test_an_adapter_for_each_row_is_pefts(model: Any, world: World, wrapped: Callable[..., Any]):
    module = adapted(model)
    reference = copy.deepcopy(module)
    engine = wrapped(module)
    kwargs = {"input_ids": world.ids, "attention_mask": world.mask, **BASE}
    mixed = {**kwargs, "adapter_names": ["default", "__base__", "default"]}
    ours = engine.generate(**mixed)
    assert "adapter_names" in engine.stats.notes[0]
    assert torch.equal(ours, reference.generate(**mixed))
    plain = engine.generate(**kwargs)
    assert torch.equal(ours[[0, 2]], plain[[0, 2]]) and not torch.equal(ours[1], plain[1])
