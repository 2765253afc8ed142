"""Progress is shown on a terminal and off one, and is put away whatever becomes of the call."""

from __future__ import annotations

import io
import signal
from typing import Any

import pytest
from rich.console import Console

from tritonhybrid import ConfigError, SamplingParams, progress_bar
from tritonhybrid.progress_bar import ProgressBar
from tritonhybrid.runner import Runner

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
PARAMS = [SamplingParams(max_new_tokens=new, n=2, seed=3, ignore_eos=True) for new in (12, 3, 7)]
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Screen:
    """What was drawn, and the bars that drew it."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        self.bars: list[ProgressBar] = []

    def console(self, *, is_terminal: bool) -> Console:
        return Console(
            file=self.text, force_terminal=is_terminal, width=100, color_system=None,
            highlight=False,
        )  # fmt: skip


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Screen:
    """A terminal, or what ``request.param`` says, in place of stderr."""
    screen = Screen()

    def make() -> ProgressBar:
        bar = ProgressBar(screen.console(is_terminal=getattr(request, "param", True)))
        screen.bars.append(bar)
        return bar

    monkeypatch.setattr(progress_bar, "ProgressBar", make)
    monkeypatch.setattr(progress_bar, "BAR_EVERY_S", 0.0)
    return screen


def assert_put_away(screen: Screen) -> None:
    (bar,) = screen.bars
    assert bar._bar is None
    drawn = screen.text.getvalue()
    assert drawn.count(HIDE_CURSOR) == drawn.count(SHOW_CURSOR) == 1
    assert drawn.rindex(SHOW_CURSOR) > drawn.rindex("rollout")


def test_a_bar_ends_full_with_the_rate_of_real_tokens(engine: Any, screen: Screen):
    out = engine.rollout(PROMPTS, PARAMS, progress=True)
    assert len(out.completions) == 6
    drawn = screen.text.getvalue()
    states = [f"{done}/6" in drawn for done in (0, 2, 4, 6)]
    assert states == [True] * 4
    assert "tokens/s" in drawn and "s left" in drawn
    (bar,) = screen.bars
    assert (bar._num_done, bar._num_tokens, bar._most_left) == (6, 44, 0)
    assert_put_away(screen)


def test_an_early_end_shortens_the_time_left(engine: Any, screen: Screen):
    (first,) = engine.rollout([[3, 4]], SamplingParams(max_new_tokens=5, temperature=0)).completions
    ends = SamplingParams(max_new_tokens=50, temperature=0.0, stop_token_ids=(first.token_ids[1],))
    engine.rollout([[3, 4]], ends, progress=True)
    (bar,) = screen.bars
    assert (bar._num_tokens, bar._most_left) == (2, 0)


@pytest.mark.parametrize("screen", [False], indirect=True)
def test_off_a_terminal_it_writes_plain_lines(engine: Any, screen: Screen):
    engine.rollout(PROMPTS, PARAMS, progress=True)
    (line,) = screen.text.getvalue().splitlines()
    assert line.startswith("rollout 6/6 ") and line.endswith(" tokens/s")


def test_without_progress_nothing_is_drawn_and_nobody_watches(engine: Any, screen: Screen):
    engine.rollout(PROMPTS, PARAMS)
    assert screen.bars == []


def test_a_rank_without_prompts_draws_nothing(engine: Any, screen: Screen):
    assert engine.rollout([], PARAMS[0], progress=True).completions == []
    assert screen.text.getvalue() == ""


def test_a_stream_draws_and_puts_away_when_it_is_closed(
    engine: Any, screen: Screen, capsys: pytest.CaptureFixture
):
    with engine.rollout_stream(PROMPTS, PARAMS, progress=True) as stream:
        next(stream)
        assert screen.bars[0]._bar is not None
        print("the consumer's own")
    assert capsys.readouterr().out == "the consumer's own\n"
    assert "the consumer's own" not in screen.text.getvalue()
    assert_put_away(screen)


def test_a_resumed_rollout_counts_what_is_left_of_it(engine: Any, screen: Screen):
    part = engine.rollout(PROMPTS, PARAMS, token_budget=20)
    left = 44 - part.stats.completion_tokens
    out = engine.resume(part.paused, progress=True)
    (bar,) = screen.bars
    assert (bar._num_done, bar._num_tokens, bar._most_left) == (len(out.completions), left, 0)


def test_a_refused_argument_draws_nothing(engine: Any, screen: Screen):
    with pytest.raises(ConfigError):
        engine.rollout([[]], PARAMS[0], progress=True)
    assert screen.text.getvalue() == ""


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_call_and_ctrl_c_put_the_bar_away(
    engine: Any, screen: Screen, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
):
    execute, steps = Runner.execute, []

    def break_third(self: Runner, step: Any) -> Any:
        steps.append(step)
        if len(steps) == 3:
            if kind is ZeroDivisionError:
                raise ZeroDivisionError
            signal.raise_signal(signal.SIGINT)
        return execute(self, step)

    monkeypatch.setattr(Runner, "execute", break_third)
    with pytest.raises(kind):
        engine.rollout(PROMPTS, PARAMS, progress=True)
    assert_put_away(screen)


@pytest.mark.parametrize("stderr", ["file", None])
def test_a_stderr_that_is_no_terminal_or_gone_is_no_matter(
    engine: Any, monkeypatch: pytest.MonkeyPatch, stderr: str | None
):
    import sys

    file = io.StringIO() if stderr else None
    monkeypatch.setattr(sys, "stderr", file)
    out = engine.rollout(PROMPTS, PARAMS, progress=True)
    assert [len(c.token_ids) for c in out.completions] == [12, 12, 3, 3, 7, 7]
    assert file is None or file.getvalue().startswith("rollout 6/6 ")


def test_the_rate_leaves_out_what_came_before_the_first_step():
    from tritonhybrid.call_observer import StepReport
    from tritonhybrid.sequence import Sequence

    now = [100.0]
    screen = Screen()
    bar = ProgressBar(screen.console(is_terminal=False), clock=lambda: now[0])
    sequence = Sequence(
        prompt_index=0, sample_index=0, uid=0, key=0, prompt=(3,), prompt_key=0,
        params=SamplingParams(max_new_tokens=100), end_ids=frozenset(),
    )  # fmt: skip
    bar.on_admit([sequence])
    now[0] = 130.0
    bar.on_step(StepReport(start_s=129.0, seconds=1.0, kept_tokens=1))
    now[0] = 141.0
    bar.on_step(StepReport(start_s=130.0, seconds=11.0, kept_tokens=23))
    # 24 tokens in 12 s; 76 of 100 may follow.
    assert screen.text.getvalue().splitlines()[-1] == "rollout 0/1 2 tokens/s, about 38 s left"
