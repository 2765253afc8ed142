"""A caller's own code raises inside ``generate``: the error arrives, and the engine trains on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    build_model,
    hf_greedy,
    hybrid_engine,
    micro_step,
    plain_copy,
    plain_engine,
    ragged_prompts,
    tokens,
)
from peft import LoraConfig, TaskType, get_peft_model
from training_state import differences, snapshot
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import tritonhybrid
from tritonhybrid import SamplingParams

GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)
PROMPTS = ragged_prompts(3)
ERRORS: dict[str, type[BaseException]] = {
    "error": ZeroDivisionError,
    "ctrl_c": KeyboardInterrupt,
}


class Bomb:
    """Raises when it is met for the third time, if it is armed at all."""

    def __init__(self, kind: str | None) -> None:
        self._kind = kind
        self.num_calls = 0
        self.raised: BaseException | None = None

    def tick(self) -> None:
        self.num_calls += 1
        if self.num_calls == 3 and self._kind is not None:
            self.raised = ERRORS[self._kind]("on purpose")
            raise self.raised


class Processor(Bomb, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tick()
        return scores


class Criterion(Bomb, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tick()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Stream(Bomb, BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        self.tick()

    def end(self) -> None:
        self.tick()


class Prefix(Bomb):
    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        self.tick()
        return list(range(3, 50))


class Decoding(Bomb):
    """A decoding of the caller's own, half of it HF's."""

    def __call__(self, model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        self.num_calls = 2
        model(input_ids)
        self.tick()
        return input_ids


def lists(name: str) -> Callable[[Bomb], dict[str, Any]]:
    return lambda bomb: {name: LogitsProcessorList([bomb])}


# The class, the arguments it is handed over by, and the way the call goes.
CALLBACKS: dict[str, tuple[type[Bomb], Callable[[Bomb], dict[str, Any]], str]] = {
    "streamer": (Stream, lambda bomb: {"streamer": bomb}, "fused"),
    "streamer on HF's loop": (Stream, lambda bomb: {"streamer": bomb, "max_time": 1e9}, "hf"),
    "logits_processor": (Processor, lists("logits_processor"), "hf"),
    "stopping_criteria": (Criterion, lambda bomb: {"stopping_criteria": [bomb]}, "hf"),
    "prefix_allowed_tokens_fn": (Prefix, lambda bomb: {"prefix_allowed_tokens_fn": bomb}, "hf"),
    "custom_generate": (Decoding, lambda bomb: {"custom_generate": bomb}, "hf"),
}


def call(engine: Any, name: str, kind: str | None) -> tuple[BaseException | None, Bomb]:
    """What a call with a callback raises, and the callback."""
    make, arguments, _ = CALLBACKS[name]
    bomb = make(kind)
    ids = torch.tensor([[5, 6, 7]])
    try:
        engine.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=None, **arguments(bomb)
        )
    except BaseException as error:
        return error, bomb
    return None, bomb


def aftermath(engine: Any, before: dict[str, Any]) -> dict[str, Any]:
    """What the failed call has changed, and how training and generation go on."""
    changed = differences(before, snapshot(engine))
    generation = engine._tritonhybrid.generation
    holds = [generation.cache is not None, generation.blocks is not None]
    losses = [micro_step(engine, index) for index in range(2)]
    after = tokens(engine.rollout(PROMPTS, GREEDY))
    ids = torch.tensor([PROMPTS[0]])
    generated = engine.generate(ids, max_new_tokens=8, do_sample=False)[0, len(PROMPTS[0]) :]
    copy = plain_copy(engine)
    return {
        "changed": changed,
        "holds": holds,
        "losses": losses,
        "tokens": [*after, generated.tolist()],
        "hf_tokens": hf_greedy(copy, [*PROMPTS, PROMPTS[0]], 8),
        "is_plain": bool(
            torch.equal(generated, engine.module.generate(ids, max_new_tokens=8)[0, len(ids[0]) :])
        ),
    }


def raise_midway(stage: int, name: str, kind: str) -> dict[str, Any]:
    """In training mode, so that modes must come back too."""
    engine = hybrid_engine(stage)
    engine.train()
    before = snapshot(engine)
    error, bomb = call(engine, name, kind)
    return {
        "is_it": error is bomb.raised and error is not None,
        "path": engine.stats.path,
        "calls": bomb.num_calls,
        **aftermath(engine, before),
    }


def healthy_losses(stage: int) -> list[float]:
    engine = plain_engine(stage)
    return [micro_step(engine, index) for index in range(2)]


@pytest.fixture(scope="module")
def undisturbed(ranks) -> Callable[[int, int], list[list[float]]]:
    """Return a function to the losses of training without us, by world size and stage."""
    known: dict[tuple[int, int], list[list[float]]] = {}

    def losses(world_size: int, stage: int) -> list[list[float]]:
        key = (world_size, stage)
        if key not in known:
            known[key] = ranks(world_size).run(healthy_losses, stage)
        return known[key]

    return losses


@pytest.mark.parametrize("kind", ["error", "ctrl_c"])
@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("stage", [0, 3])
def test_what_a_callback_raises_arrives_and_the_engine_trains_on(
    ranks, undisturbed, stage, name, kind
):
    (result,) = ranks(1).run(raise_midway, stage, name, kind)
    assert result["is_it"] and result["calls"] == 3
    assert result["path"] == CALLBACKS[name][2]
    assert result["changed"] == []
    # A broken call's pages are given up, not handed on.
    assert result["holds"] == [False, False]
    assert result["losses"] == undisturbed(1, stage)[0]
    assert result["tokens"] == result["hf_tokens"]
    assert result["is_plain"]


class Waits(Stream, LogitsProcessor):
    """Gets Ctrl-C while it works."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tick()
        return scores

    def tick(self) -> None:
        self.num_calls += 1
        if self.num_calls == 3:
            signal.raise_signal(signal.SIGINT)
            self.num_calls = 99


def press_ctrl_c(name: str) -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = hybrid_engine(0)
    before = snapshot(engine)
    waits = Waits(None)
    given: Any = waits if name == "streamer" else LogitsProcessorList([waits])
    error: BaseException | None = None
    try:
        engine.generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=6, eos_token_id=None, **{name: given}
        )
    except KeyboardInterrupt as interrupt:
        error = interrupt
    return {"error": repr(error), "calls": waits.num_calls, **aftermath(engine, before)}


@pytest.mark.parametrize("name", ["streamer", "logits_processor"])
def test_ctrl_c_reaches_a_callback_at_work(ranks, undisturbed, name):
    (result,) = ranks(1).run(press_ctrl_c, name)
    assert result["error"] == "KeyboardInterrupt()" and result["calls"] == 3
    assert result["changed"] == []
    assert result["losses"] == undisturbed(1, 0)[0]
    assert result["tokens"] == result["hf_tokens"]


def one_rank_raises(name: str, kind: str) -> dict[str, Any]:
    engine = hybrid_engine(3)
    before = snapshot(engine)
    error, _ = call(engine, name, kind if torch.distributed.get_rank() == 1 else None)
    return {"error": f"{type(error).__name__}: {error}", **aftermath(engine, before)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("streamer", "error"),
        ("streamer on HF's loop", "ctrl_c"),
        ("logits_processor", "error"),
    ],
)
def test_a_callback_that_raises_on_one_rank_is_named_on_the_other(ranks, undisturbed, name, kind):
    good, bad = ranks(2).run(one_rank_raises, name, kind)
    expected = f"{ERRORS[kind].__name__}: on purpose"
    assert bad["error"] == expected
    assert good["error"].startswith(
        f"RankFailureError: rank 1 failed during a collective rollout: {expected}"
    )
    for result, losses in zip((good, bad), undisturbed(2, 3), strict=True):
        assert result["changed"] == []
        assert result["losses"] == losses
        assert result["tokens"] == result["hf_tokens"]


def interrupted_adapters(kind: str) -> dict[str, Any]:
    """PEFT patches the base model around its generate."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM)
    module = get_peft_model(build_model(), config)
    engine = tritonhybrid.wrap(plain_engine(0, model=module))
    base = module.base_model
    own = [base.prepare_inputs_for_generation]
    for name in ("streamer", "logits_processor"):
        with contextlib.suppress(BaseException):
            call(engine, name, kind)
        own.append(base.prepare_inputs_for_generation)
    ids = torch.tensor([PROMPTS[0]])
    module.eval()
    with module.disable_adapter():
        ours = base.generate(ids, max_new_tokens=8, do_sample=False)
    expected = build_model().eval().generate(ids, max_new_tokens=8, do_sample=False)
    return {"are_own": [each == own[0] for each in own], "is_equal": torch.equal(ours, expected)}


@pytest.mark.parametrize("kind", ["error", "ctrl_c"])
def test_pefts_patch_of_the_base_model_is_taken_back(ranks, kind):
    (result,) = ranks(1).run(interrupted_adapters, kind)
    assert result["are_own"] == [True] * 3
    assert result["is_equal"]
