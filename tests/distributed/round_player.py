"""Plays random rounds on one rank, and holds every result against an independent one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from models import forward, hybrid_engine, plain_copy, plain_engine
from rounds import MAX_PROMPT, Fault, Round, Work, draw_round, draw_settings
from training_state import differences, snapshot

from tritonhybrid import Completion, RolloutOutput, SamplingParams
from tritonhybrid.sequence import Sequence
from tritonhybrid.testing import hold

# Of this process; the engine outlives a round.
_spells: dict[str, Spell] = {}


def begin(seed: int, spell: int) -> None:
    """Build the engines of a spell of rounds."""
    _spells.clear()
    _spells["now"] = Spell(seed, spell)


def play(index: int) -> dict[str, Any]:
    """Play one round.

    Returns:
        "problems" in words, and the "error" that the act raised, if any.
    """
    return _spells["now"].play(index)


class Spell:
    """A wrapped engine, its twin that never generates, and plain copies of its weights.

    Args:
        seed: Of all rounds.
        number: Of the spell.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.seed = seed
        self.stage, config = draw_settings(seed, number)
        self.twin = plain_engine(self.stage)
        self.engine = hybrid_engine(self.stage, config=config)
        self.state = self.engine.__dict__["_tritonhybrid"]
        self.rank = torch.distributed.get_rank()
        self.num_trained = 0
        self.problems: list[str] = []
        # What was paused last; it keeps its pages until another call has need of them.
        self.paused: list[Sequence] = []
        # Tokens of the latest sequences.
        self.history: list[list[int]] = []
        # By policy version; what rollouts are compared with.
        self.copies: dict[int, Any] = {}
        self._copy()
        # The probe comes first: what goes wrong in it is another test's.
        self.engine.rollout([[5, 6, 7]], SamplingParams(max_new_tokens=2))

    def play(self, index: int) -> dict[str, Any]:
        """Play one round."""
        start = time.perf_counter()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        plan = draw_round(self.seed, index)
        self.problems = []
        self.before = snapshot(self.engine)
        error = ""
        has_fired: list[str] = []
        own = plan.fault if plan.fault is not None and plan.fault.rank == self.rank else None
        try:
            with self._acting_up(own, has_fired):
                getattr(self, f"_{plan.act}")(plan, self._with_history(plan), own)
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        self._check_idle()
        if plan.trains_after:
            self._train()
        return {
            "problems": self.problems,
            "error": error,
            "has_fired": bool(has_fired),
            "seconds": time.perf_counter() - start,
        }

    def _with_history(self, plan: Round) -> Work:
        """This rank's work, its prompts beginning with what is in the pages perhaps."""
        work = plan.works[self.rank]
        prompts = list(work.prompts)
        for index, (age, length) in work.follows.items():
            if age < len(self.history):
                prompts[index] = [*self.history[-1 - age][:length], *prompts[index]][:MAX_PROMPT]
        return replace(work, prompts=prompts)

    def _remember(self, work: Work, completions: list[Completion]) -> None:
        self.history += [[*work.prompts[c.prompt_index], *c.token_ids] for c in completions]
        del self.history[:-6]

    # Acts.

    def _rollout(self, plan: Round, work: Work, fault: Fault | None) -> None:
        budget = {"token_budget": 0} if fault and fault.kind == "budget of nothing" else {}
        out = self.engine.rollout(work.prompts, work.sampling, uids=work.uids, **budget)
        self._check_whole(work, out.completions)
        self._check_steps(out.completions, out.stats)

    def _generate(self, plan: Round, work: Work, fault: Fault | None) -> None:
        if not work.prompts:
            assert self.engine.rollout([], work.sampling).completions == []
            return
        params = work.sampling[0]
        width = max(map(len, work.prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in work.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in work.prompts])
        kwargs: dict[str, Any] = {
            "max_new_tokens": params.max_new_tokens,
            "do_sample": False,
            "eos_token_id": params.eos_token_id or 2,
            "pad_token_id": 0,
            "repetition_penalty": params.repetition_penalty,
        }
        if params.suppress_tokens:
            kwargs["suppress_tokens"] = list(params.suppress_tokens)
        if plan.fault is None and plan.index % 4 == 0:
            kwargs |= {"num_beams": 2, "max_new_tokens": min(4, params.max_new_tokens)}
        ours = self.engine.generate(ids, attention_mask=mask, **kwargs).tolist()
        with torch.no_grad():
            hf = self._latest.generate(ids, attention_mask=mask, **kwargs).tolist()
        self._expect(ours == hf, f"generate gave {ours}, HF {hf}")

    def _stream(self, plan: Round, work: Work, fault: Fault | None) -> None:
        got: list[Completion] = []
        budget = {"token_budget": 0} if fault and fault.kind == "budget of nothing" else {}
        with self.engine.rollout_stream(
            work.prompts, work.sampling, uids=work.uids, **budget
        ) as stream:
            while work.closes_after is None or len(got) < work.closes_after:
                if fault is not None and len(got) == fault.at:
                    if fault.kind == "consumer raises":
                        raise ZeroDivisionError("on purpose")
                    if fault.kind == "consumer is interrupted":
                        signal.raise_signal(signal.SIGINT)
                if len(got) in work.aborts:
                    stream.abort(work.aborts[len(got)])
                completion = next(stream, None)
                if completion is None:
                    break
                got.append(completion)
        reference = self._reference(work)
        is_closed = work.closes_after is not None and len(got) == work.closes_after
        keys = [_key(c) for c in got]
        self._expect(len(set(keys)) == len(keys), f"a completion came twice: {keys}")
        self._expect(is_closed or set(keys) == set(reference), f"only {sorted(keys)} came")
        aborted = set(work.aborts.values())
        for c in got:
            if c.finish_reason == "abort":
                self._expect(c.prompt_index in aborted, f"{_key(c)} was not aborted")
            self._check_against(reference[_key(c)], c, is_part=c.finish_reason == "abort")
        self._check_logprobs(work, got)

    def _budget(self, plan: Round, work: Work, fault: Fault | None) -> None:
        versions = [self.engine.global_steps]
        budgets = work.budgets
        out = self.engine.rollout(
            work.prompts, work.sampling, uids=work.uids, token_budget=budgets[0]
        )
        done = {_key(c): c for c in out.completions}
        self._note_pause(out)
        if plan.is_left:
            self._check_parts(work, done, versions)
            return
        # As often on every rank.
        num_parts = max(len(w.budgets) for w in plan.works)
        for part in range(1, num_parts + 1):
            if plan.trains_between and part == 1:
                self._train()
                versions.append(self.engine.global_steps)
            budget = budgets[part] if part < min(len(budgets), num_parts) else None
            out = self.engine.resume(out.paused, token_budget=budget)
            done |= {_key(c): c for c in out.completions}
            self._note_pause(out)
        self._expect(out.paused is None, "a rollout without a budget was paused")
        self._check_parts(work, done, versions)

    def _note_pause(self, out: RolloutOutput) -> None:
        if out.paused is not None:
            self.paused = out.paused.sequences

    # Training.

    def _train(self) -> None:
        """One step of both engines, from one state of torch's generator."""
        state = torch.get_rng_state()
        ours = _step(self.engine, self.num_trained)
        torch.set_rng_state(state)
        theirs = _step(self.twin, self.num_trained)
        self.num_trained += 1
        self._expect(ours == theirs, f"loss {ours}, {theirs} without rollouts")
        pairs = zip(self.engine.module.parameters(), self.twin.module.parameters(), strict=True)
        are_equal = all(torch.equal(_own(p), _own(q)) for p, q in pairs)
        self._expect(are_equal, "weights differ from those of training without rollouts")
        self._copy()
        self.before = snapshot(self.engine)

    def _copy(self) -> None:
        self._latest = plain_copy(self.engine)
        self.copies[self.engine.global_steps] = self._latest

    # Checks.

    def _expect(self, is_so: bool, problem: str) -> None:
        if not is_so:
            self.problems.append(problem)

    def _reference(self, work: Work, version: int | None = None) -> dict[Any, Completion]:
        """The same from a plain copy in one batch, under the default settings."""
        model = self._latest if version is None else self.copies[version]
        with torch.random.fork_rng(devices=[]):
            out = hold(model).rollout(work.prompts, work.sampling, uids=work.uids)
        return {_key(c): c for c in out.completions}

    def _check_against(self, expected: Completion, c: Completion, *, is_part: bool) -> None:
        whole = expected.token_ids
        self._expect(
            c.token_ids == (whole[: len(c.token_ids)] if is_part else whole),
            f"{_key(c)} is {c.token_ids}, alone it is {whole}",
        )
        if not is_part:
            self._expect(c.finish_reason == expected.finish_reason, f"{_key(c)}: {c.finish_reason}")

    def _check_whole(self, work: Work, completions: list[Completion]) -> None:
        reference = self._reference(work)
        self._expect([_key(c) for c in completions] == list(reference), "others came out")
        for c in completions:
            self._check_against(reference[_key(c)], c, is_part=False)
        self._check_logprobs(work, completions)

    def _check_parts(self, work: Work, done: dict[Any, Completion], versions: list[int]) -> None:
        """What was resumed: up to the first new weights it is the uninterrupted rollout."""
        reference = self._reference(work, versions[0])
        self._expect(list(done) == list(reference), f"{list(done)} came")
        for key, c in done.items():
            number = c.policy_versions.count(versions[0])
            seen = [*([versions[0]] * number), *([versions[-1]] * (len(c.token_ids) - number))]
            self._expect(c.policy_versions == seen, f"{key}: versions {c.policy_versions}")
            is_whole = number == len(c.token_ids) and c.finish_reason != "budget"
            if is_whole:
                self._check_against(reference[key], c, is_part=False)
            else:
                start = reference[key].token_ids[:number]
                self._expect(c.token_ids[:number] == start, f"{key} does not begin with {start}")
        self._check_logprobs(work, list(done.values()))

    def _check_logprobs(self, work: Work, completions: list[Completion]) -> None:
        """Each token's raw log-probability is HF's under the weights that sampled it."""
        self._remember(work, completions)
        for version in {v for c in completions for v in c.policy_versions}:
            rows = [[*work.prompts[c.prompt_index], *c.token_ids] for c in completions]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            with torch.no_grad():
                logits = self.copies[version](input_ids=ids, attention_mask=mask).logits
            scores = logits.double().log_softmax(-1)
            for row, c in enumerate(completions):
                start = len(work.prompts[c.prompt_index]) - 1
                for at, token in enumerate(c.token_ids):
                    if c.policy_versions[at] == version:
                        found, hf = c.raw_logprobs[at], float(scores[row, start + at, token])
                        self._expect(abs(found - hf) < 2e-4, f"{_key(c)}[{at}]: {found}, HF {hf}")

    def _check_steps(self, completions: list[Completion], stats: Any) -> None:
        longest = max((len(c.token_ids) for c in completions), default=0)
        # Where the first step took all prompts, each later one is for the longest live sequence.
        if stats.num_prefill_steps == 1 and stats.preemptions == 0:
            self._expect(
                stats.num_decode_steps == longest - 1,
                f"{stats.num_decode_steps} decode steps for {longest} tokens",
            )
        total = sum(len(c.token_ids) for c in completions)
        self._expect(stats.num_decode_steps <= total, f"{stats.num_decode_steps} decode steps")

    def _check_idle(self) -> None:
        """Everything is as it was before the round, or after its training step."""
        self.problems += differences(self.before, snapshot(self.engine))
        self._expect(not self.state.is_busy, "the engine is busy")
        handler = signal.getsignal(signal.SIGINT)
        self._expect(handler is signal.default_int_handler, "the handler of SIGINT is another")
        blocks = self.state.generation.blocks
        if blocks is not None:
            try:
                blocks.check_integrity([sequence.block_table for sequence in self.paused])
            except AssertionError as error:
                self.problems.append(str(error))

    # Faults.

    @contextmanager
    def _acting_up(self, fault: Fault | None, has_fired: list[str]) -> Iterator[None]:
        """An operation of this rank fails, gives NaN or is interrupted, once."""
        if fault is None or not fault.op:
            yield
            return
        ops = self.state.generation.ops()
        original = getattr(ops, fault.op)
        object.__setattr__(ops, fault.op, _failing(original, fault, has_fired))
        try:
            yield
        finally:
            object.__setattr__(ops, fault.op, original)


def _failing(original: Callable[..., Any], fault: Fault, has_fired: list[str]) -> Any:
    count = 0

    def act(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count != fault.at + 1:
            return original(*args, **kwargs)
        has_fired.append(fault.kind)
        if fault.kind == "op raises":
            raise ZeroDivisionError("on purpose")
        if fault.kind == "op is interrupted":
            signal.raise_signal(signal.SIGINT)
        out = original(*args, **kwargs)
        for tensor in out if isinstance(out, tuple) else (out,):
            tensor.fill_(float("nan"))
        return out

    return act


def _step(engine: Any, index: int) -> float:
    loss = forward(engine, index)
    engine.backward(loss)
    engine.step()
    return loss.item()


def _own(parameter: Any) -> torch.Tensor:
    """This rank's part of a parameter."""
    return getattr(parameter, "ds_tensor", parameter.data)


def _key(completion: Completion) -> tuple[int, int]:
    return completion.prompt_index, completion.sample_index
