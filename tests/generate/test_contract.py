"""``docs/generate.md`` row by row: the way each argument goes, and Hugging Face's answer to it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.generation.utils
from contract_cases import BASE, CASES, PROMPTS, WIDTH, Case, CoarseCache, World
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
)
from transformers.utils.generic import TransformersKwargs

from tritonhybrid import ConfigError
from tritonhybrid.containers.parts import cache_name

DOCUMENT = Path(__file__).parents[2] / "docs" / "generate.md"
WAYS = {"native": ("fused", "generic"), "HF's loop": ("hf",)}


def documented(part: str = "") -> dict[str, str]:
    """The way of each row, by its first cell; of one heading's table, or of all."""
    text = DOCUMENT.read_text()
    inside = text.split("<!-- generate-contract -->")[1].split("<!-- /generate-contract -->")[0]
    if part:
        inside = next(each for each in inside.split("## ") if each.startswith(part))
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
    is_newer = row in documented("Fields of `GenerationConfig`") and name not in installed()
    if is_newer or (name == "cache" and cache_name(engine.module) != "cache"):
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
