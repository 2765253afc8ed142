"""Completions come as they finish; a stream can be aborted, closed or left by an exception."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tritonhybrid import ConfigError, EngineStateError, SamplingParams

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
PARAMS = [SamplingParams(max_new_tokens=new, n=2, seed=3, ignore_eos=True) for new in (12, 3, 7)]


def key(completion: Any) -> tuple[int, int]:
    return completion.prompt_index, completion.sample_index


def assert_idle(engine: Any) -> None:
    """Everything is put back, and the engine serves the next call as ever."""
    state = engine.__dict__["_tritonhybrid"]
    assert not state.is_busy
    assert state.generation.blocks is None or state.generation.blocks.num_used == 0
    assert all("forward" not in module.__dict__ for module in engine.module.modules())
    out = engine.rollout(PROMPTS, PARAMS)
    assert len(out.completions) == 6


def test_completions_come_shortest_first_and_are_those_of_a_rollout(engine: Any):
    whole = {key(c): c for c in engine.rollout(PROMPTS, PARAMS).completions}
    with engine.rollout_stream(PROMPTS, PARAMS) as stream:
        streamed = list(stream)
    assert [c.prompt_index for c in streamed] == [1, 1, 2, 2, 0, 0]
    assert {key(c): c.token_ids for c in streamed} == {k: c.token_ids for k, c in whole.items()}
    assert {key(c): c.logprobs for c in streamed} == {k: c.logprobs for k, c in whole.items()}
    assert stream.stats.completion_tokens == 2 * (12 + 3 + 7)
    assert stream.paused is None
    assert engine.stats is stream.stats
    assert_idle(engine)


def test_the_rollout_goes_on_only_while_it_is_asked_for(engine: Any):
    with engine.rollout_stream(PROMPTS, PARAMS) as stream:
        next(stream)
        assert stream.stats.num_decode_steps == 2
        next(stream), next(stream)
        assert stream.stats.num_decode_steps == 6


def test_the_consumer_runs_in_its_own_modes(engine: Any):
    weight = torch.ones(3, requires_grad=True)
    for _ in engine.rollout_stream(PROMPTS, PARAMS):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        (weight.sum() * 2).backward()
    assert weight.grad.tolist() == [12.0] * 3
    with torch.inference_mode():
        for _ in engine.rollout_stream(PROMPTS, PARAMS):
            assert torch.is_inference_mode_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in engine.rollout_stream(PROMPTS, PARAMS):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert_idle(engine)


def test_an_aborted_prompt_comes_out_with_what_it_has(engine: Any):
    whole = {key(c): c for c in engine.rollout(PROMPTS, PARAMS).completions}
    with engine.rollout_stream(PROMPTS, PARAMS) as stream:
        first = next(stream)
        assert first.prompt_index == 1
        assert stream.abort(0) == 2
        assert stream.abort(0) == 0
        assert stream.abort(1) == 0
        rest = list(stream)
    aborted = [c for c in rest if c.prompt_index == 0]
    assert [c.finish_reason for c in aborted] == ["abort"] * 2
    for c in aborted:
        assert c.token_ids == whole[key(c)].token_ids[:3]
        assert c.logprobs == whole[key(c)].logprobs[:3]
    others = [c for c in rest if c.prompt_index == 2]
    assert [c.token_ids for c in others] == [whole[key(c)].token_ids for c in others]
    assert [c.finish_reason for c in others] == ["length"] * 2
    assert stream.stats.num_decode_steps == 6
    assert_idle(engine)


def test_a_prompt_that_is_not_in_the_call_cannot_be_aborted(engine: Any):
    with engine.rollout_stream(PROMPTS, PARAMS) as stream:
        with pytest.raises(ConfigError, match=r"one of \[0, 1, 2\], got 3"):
            stream.abort(3)
        assert len(list(stream)) == 6


def test_a_closed_stream_gives_up_what_has_not_finished(engine: Any):
    with engine.rollout_stream(PROMPTS, PARAMS) as stream:
        next(stream)
    assert list(stream) == []
    assert stream.stats.num_decode_steps == 2
    assert_idle(engine)


def test_a_stream_closed_before_its_first_completion_leaves_nothing(engine: Any):
    engine.rollout_stream(PROMPTS, PARAMS).close()
    assert_idle(engine)


@pytest.mark.parametrize("kind", [ZeroDivisionError, StopIteration])
def test_an_exception_in_the_consumer_closes_the_stream(engine: Any, kind: type[Exception]):
    error = kind("on purpose")
    with pytest.raises(kind) as caught, engine.rollout_stream(PROMPTS, PARAMS) as stream:
        for _ in stream:
            raise error
    assert caught.value is error
    assert_idle(engine)


def test_a_stream_inside_a_generator_that_is_closed_is_closed_too(engine: Any):
    def consume() -> Iterator[Any]:
        with engine.rollout_stream(PROMPTS, PARAMS) as stream:
            yield from stream

    consumer = consume()
    next(consumer)
    consumer.close()
    assert_idle(engine)


class FailingTokenizer:
    """Decodes nothing."""

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise ZeroDivisionError("on purpose")


def test_a_failing_tokenizer_ends_the_stream_and_the_module_is_hf_s_by_then(engine_of: Any):
    engine = engine_of(tokenizer=FailingTokenizer())
    stream = engine.rollout_stream(PROMPTS, PARAMS)
    with pytest.raises(ZeroDivisionError) as caught:
        next(stream)
    # Also while someone holds on to the error and its frames.
    assert caught.traceback
    assert all("forward" not in module.__dict__ for module in engine.module.modules())
    engine.__dict__["_tritonhybrid"].generation.tokenizer = None
    assert_idle(engine)


def test_ctrl_c_in_the_consumer_arrives_at_once_and_closes_the_stream(engine: Any):
    import signal

    with pytest.raises(KeyboardInterrupt), engine.rollout_stream(PROMPTS, PARAMS) as stream:
        next(stream)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("Ctrl-C was held back")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_idle(engine)


@pytest.mark.parametrize(
    "act",
    [
        lambda engine: engine.rollout(PROMPTS, PARAMS),
        lambda engine: engine.rollout_stream(PROMPTS, PARAMS),
        lambda engine: engine.generate(torch.tensor([[3, 4]]), max_new_tokens=2),
        lambda engine: engine.train(),
        lambda engine: engine.forward(input_ids=torch.tensor([[3, 4]])),
        lambda engine: engine.step(),
    ],
    ids=["rollout", "stream", "generate", "train", "forward", "step"],
)
def test_an_engine_with_an_open_stream_does_nothing_else(engine: Any, act: Any):
    with engine.rollout_stream(PROMPTS, PARAMS) as stream:
        next(stream)
        with pytest.raises(EngineStateError):
            act(engine)
        assert len(list(stream)) == 5
    assert_idle(engine)


def test_the_module_itself_says_that_a_stream_has_it(engine: Any):
    with engine.rollout_stream(PROMPTS, PARAMS) as stream:
        next(stream)
        with pytest.raises(EngineStateError, match="close the rollout stream"):
            engine.module(input_ids=torch.tensor([[3, 4, 5]]))
        assert len(list(stream)) == 5
    assert_idle(engine)


def test_bad_arguments_are_refused_before_the_first_completion(engine: Any):
    with pytest.raises(ConfigError, match="Prompt 0 is empty"):
        engine.rollout_stream([[]], PARAMS[0])
    assert_idle(engine)


def test_logits_that_are_not_finite_end_the_stream_and_the_engine_goes_on(engine: Any):
    norm = engine.module.model.norm.weight
    with (
        pytest.raises(RuntimeError, match="not finite|log-probabilities"),
        engine.rollout_stream(PROMPTS, PARAMS) as stream,
    ):
        next(stream)
        kept = norm.data.clone()
        norm.data[:] = float("nan")
        try:
            list(stream)
        finally:
            norm.data.copy_(kept)
    assert_idle(engine)
