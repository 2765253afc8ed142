"""One real value of each argument of ``generate``, by the row of ``docs/generate.md``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tokenizers
import torch
import transformers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from tritonhybrid.containers.parts import cache_name

BASE = {"max_new_tokens": 6, "do_sample": False}
PROMPTS = [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19, 20, 21, 22, 23], [11, 12]]
WIDTH = max(map(len, PROMPTS))


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
    "`repetition_penalty`": Case(lambda w: {"repetition_penalty": 3.0}, rows=1),
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
