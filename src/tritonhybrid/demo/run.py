"""One rank of the demo: warm up by imitation, improve by reward, compare, report."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

import tritonhybrid
from tritonhybrid.call_trace import CallTrace
from tritonhybrid.demo import grpo, task
from tritonhybrid.demo.model import model_config
from tritonhybrid.demo.record import Comparison, DemoRecord, StepRecord
from tritonhybrid.demo.report import Report
from tritonhybrid.demo.settings import DemoSettings
from tritonhybrid.hf_peer import Agreement, HfPeer, Speed
from tritonhybrid.local_engine import (
    LocalEngineConfig,
    build_engine,
    join_ranks,
    leave_ranks,
    set_learning_rate,
)
from tritonhybrid.sampling_params import SamplingParams


class Progress(Protocol):
    """What a stage shows its steps to."""

    def advance(self, facts: str) -> None:
        """Count one step and say something about it."""


class Silence:
    """Stands in for the report on ranks that do not write."""

    def advance(self, facts: str) -> None:
        """Show nothing."""


class Demo:
    """State of one rank: the engine, the task, what was measured.

    Args:
        rank: This process.
        settings: The same on every rank.
        record: Filled as the run goes; means and sums are over all ranks.
        report: Shows and saves the record on rank 0, None elsewhere.
    """

    def __init__(
        self, rank: int, settings: DemoSettings, record: DemoRecord, report: Report | None
    ) -> None:
        self.rank = rank
        self.settings = settings
        self.record = record
        self.report = report
        self.task = task.SortingTask()
        self.engine: Any = None

    def start(self, rendezvous: Path) -> None:
        """Build the model, the DeepSpeed engine around it, and wrap it."""
        settings = self.settings
        if settings.device == "cpu":
            # Ops this small gain nothing from more threads, and threads that wait for each
            # other on a busy machine are many times slower than one.
            torch.set_num_threads(1)
        join_ranks(self.rank, settings.ranks, settings.device, rendezvous)
        torch.manual_seed(settings.seed)
        config = LocalEngineConfig(
            zero_stage=settings.zero,
            device=settings.device,
            micro_batch_size=settings.warm_up_batch // settings.ranks,
            lr=settings.warm_up_lr,
        )
        engine = build_engine(LlamaForCausalLM(model_config()), config)
        # Sequences have 19 tokens at most: small pages leave little to copy and to read past.
        self.engine = tritonhybrid.wrap(engine, config={"block_size": 16})

    def warm_up(self) -> None:
        """Imitate noisy demonstrations, through the DeepSpeed engine."""
        settings, record = self.settings, self.record
        rng = random.Random(f"warm-up {settings.seed}")
        begin = time.perf_counter()
        self.engine.train()
        with self._stage("warm-up", settings.warm_up_steps) as progress:
            for step in range(settings.warm_up_steps):
                prompts = self.task.prompts(settings.warm_up_batch, rng)
                answers = [self.task.demonstration(prompt, rng) for prompt in prompts]
                mine = slice(self.rank, None, settings.ranks)
                batch = self._pack(
                    prompts[mine],
                    answers[mine],
                    [[]] * len(prompts[mine]),
                    [0.0] * len(prompts[mine]),
                )
                rise = min(1.0, (step + 1) / 20)
                set_learning_rate(
                    self.engine,
                    settings.warm_up_lr * rise * (1 - 0.9 * step / settings.warm_up_steps),
                )
                loss = self._update(batch, partial(grpo.imitation_loss, batch=batch))
                (mean_loss,) = self._mean([loss])
                record.warm_up_losses.append(mean_loss)
                record.warm_up_s = time.perf_counter() - begin
                progress.advance(f"loss {mean_loss:.3f}")

    def improve(self) -> None:
        """Raise the verified reward with GRPO, sampling with ``engine.rollout``."""
        settings = self.settings
        rng = random.Random(f"grpo {settings.seed}")
        with self._stage("GRPO", settings.steps) as progress:
            for index in range(settings.steps):
                set_learning_rate(self.engine, settings.lr * (1 - 0.9 * index / settings.steps))
                step = self._improve_once(rng)
                self.record.steps.append(step)
                progress.advance(
                    f"reward {step.reward:.3f}, {step.num_tokens / step.rollout_s:,.0f} tokens/s"
                )

    def held_out_reward(self, temperature: float) -> float:
        """Measure the mean verified reward on prompts that training never draws.

        The same prompts and the same noise every time and on any number of ranks.
        """
        settings = self.settings
        num_samples = settings.held_out_samples if temperature else 1
        prompts, uids = self._held_out(settings.held_out_prompts)
        sampling = SamplingParams(
            max_new_tokens=self.task.max_new_tokens,
            temperature=temperature,
            n=num_samples,
            seed=settings.seed,
        )
        self.engine.eval()
        output = self.engine.rollout(prompts, sampling, uids=uids)
        self.engine.train()
        rewards = [
            self.task.verify(prompts[done.prompt_index], done.token_ids)
            for done in output.completions
        ]
        (reward,) = self._mean([sum(rewards) / len(rewards)])
        return reward

    def compare(self) -> Comparison:
        """Time our rollout and HF's generate in turns, and compare greedy tokens.

        HF's runs on a plain copy of the weights, its fastest way: under ZeRO-3 the module's
        own generate would gather every layer for every token.
        """
        settings = self.settings
        peer = HfPeer(
            LlamaForCausalLM(model_config()).to(self.engine.device), pad_token_id=task.PAD
        )
        peer.load_weights(self.engine)
        self.engine.eval()
        prompts, uids = self._held_out(settings.prompts_per_step)
        greedy = SamplingParams(max_new_tokens=self.task.max_new_tokens, temperature=0.0)
        sampled = SamplingParams(
            max_new_tokens=self.task.max_new_tokens, n=settings.samples_per_prompt
        )
        all_prompts, _ = self._held_out(settings.held_out_prompts)
        ours = self.engine.rollout(all_prompts, greedy).completions
        equal = Agreement.between(
            [done.token_ids for done in ours], peer.generate(all_prompts, greedy)
        )
        our_speed, their_speed = Speed(), Speed()
        with self._stage("comparison", settings.comparison_rounds) as progress:
            for _ in range(settings.comparison_rounds):
                begin = time.perf_counter()
                output = self.engine.rollout(prompts, sampled, uids=uids)
                our_speed.add(
                    [done.token_ids for done in output.completions], time.perf_counter() - begin
                )
                peer.timed(prompts, sampled, their_speed)
                progress.advance(
                    f"{our_speed.tokens_per_s:,.0f} tokens/s, HF {their_speed.tokens_per_s:,.0f}"
                )
        self.engine.train()
        return self._over_ranks(equal, our_speed, their_speed)

    def finish(self) -> None:
        """Bring the ranks' measurements together."""
        drift = self.record.drift
        num_tokens, sum_abs, sum_k3 = self._sum([drift.num_tokens, drift.sum_abs, drift.sum_k3])
        (max_abs,) = self._reduce([drift.max_abs], dist.ReduceOp.MAX)
        self.record.drift = grpo.Drift(
            num_tokens=round(num_tokens), sum_abs=sum_abs, max_abs=max_abs, sum_k3=sum_k3
        )

    def _improve_once(self, rng: random.Random) -> StepRecord:
        settings, record = self.settings, self.record
        mine = slice(self.rank, None, settings.ranks)
        prompts = self.task.prompts(settings.prompts_per_step, rng)[mine]
        sampling = SamplingParams(
            max_new_tokens=self.task.max_new_tokens, n=settings.samples_per_prompt
        )
        begin = time.perf_counter()
        self.engine.eval()
        # Every prompt of the run has a number of its own, so the samples don't depend on ranks.
        uids = list(range(settings.prompts_per_step))[mine]
        output = self.engine.rollout(prompts, sampling, uids=uids)
        self.engine.train()
        rollout_s = time.perf_counter() - begin
        record.rollout_stats = asdict(output.stats)

        done = output.completions
        rewards = [self.task.verify(prompts[c.prompt_index], c.token_ids) for c in done]
        batch = self._pack(
            [prompts[c.prompt_index] for c in done],
            [c.token_ids for c in done],
            # At temperature 1 without filters they are also the ones that were sampled from.
            [c.raw_logprobs for c in done],
            grpo.group_advantages(rewards, settings.samples_per_prompt),
        )
        loss = self._update(
            batch,
            partial(grpo.clipped_loss, batch=batch, max_new_tokens=self.task.max_new_tokens),
            drift=record.drift,
        )
        training_s = time.perf_counter() - begin - rollout_s
        reward, mean_loss = self._mean([sum(rewards) / len(rewards), loss])
        (num_tokens,) = self._sum([sum(len(c.token_ids) for c in done)])
        return StepRecord(
            reward=reward,
            loss=mean_loss,
            num_tokens=round(num_tokens),
            rollout_s=rollout_s,
            gather_s=output.stats.gather_s,
            training_s=training_s,
        )

    def _update(
        self,
        batch: grpo.TokenBatch,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        *,
        drift: grpo.Drift | None = None,
    ) -> float:
        logits = self.engine(input_ids=batch.input_ids, use_cache=False).logits
        logprobs = grpo.next_token_logprobs(logits, batch.input_ids)
        if drift is not None:
            drift.add(logprobs, batch)
        loss = loss_of(logprobs)
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())

    def _held_out(self, num_prompts: int) -> tuple[list[list[int]], list[int]]:
        rng = random.Random(f"held out {self.settings.seed}")
        mine = slice(self.rank, None, self.settings.ranks)
        return self.task.prompts(num_prompts, rng)[mine], list(range(num_prompts))[mine]

    def _pack(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        logprobs: list[list[float]],
        advantages: list[float],
    ) -> grpo.TokenBatch:
        return grpo.pack(
            prompts,
            completions,
            logprobs,
            advantages,
            pad_token_id=task.PAD,
            device=self.engine.device,
        )

    def _stage(self, name: str, num_steps: int) -> AbstractContextManager[Progress]:
        if self.report is None:
            return nullcontext(Silence())
        return self.report.stage(name, num_steps)

    def _over_ranks(self, equal: Agreement, ours: Speed, theirs: Speed) -> Comparison:
        counts = self._sum([equal.num_equal, equal.num_tokens, ours.num_tokens, theirs.num_tokens])
        seconds = self._reduce([ours.seconds, theirs.seconds], dist.ReduceOp.MAX)
        num_equal, num_compared, num_ours, num_theirs = map(round, counts)
        return Comparison(
            greedy=Agreement(num_equal=num_equal, num_tokens=num_compared),
            ours=Speed(num_tokens=num_ours, seconds=seconds[0]),
            theirs=Speed(num_tokens=num_theirs, seconds=seconds[1]),
        )

    def _mean(self, values: list[float]) -> list[float]:
        return [value / self.settings.ranks for value in self._sum(values)]

    def _sum(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.settings.ranks == 1:
            return values
        gathered = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(gathered, op)
        reduced: list[float] = gathered.tolist()
        return reduced


def run_rank(rank: int, settings: DemoSettings, rendezvous: Path, began_at: float) -> int:
    """Run the demo on one rank; every rank of the settings must call this.

    Args:
        rank: This process; rank 0 shows and writes.
        settings: The same on every rank.
        rendezvous: Where the ranks meet, see ``join_ranks``.
        began_at: ``time.time()`` of the command's first line.

    Returns:
        Exit code: 0; 1 when a greedy token differs from HF's, or when the whole recipe ran and
        missed its goal; 130 after Ctrl-C.
    """
    options = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(settings).items()}
    record = DemoRecord(settings=options)
    report = Report(record, settings.out) if rank == 0 else None
    demo = Demo(rank, settings, record, report)
    traced = ExitStack()
    trace: CallTrace | None = None
    try:
        demo.start(rendezvous)
        if settings.trace is not None:
            trace = traced.enter_context(demo.engine.trace(settings.trace))
        record.start_up_s = time.time() - began_at
        demo.warm_up()
        record.reward_start = demo.held_out_reward(1.0)
        record.greedy_start = demo.held_out_reward(0.0)
        demo.improve()
        record.reward_end = demo.held_out_reward(1.0)
        record.greedy_end = demo.held_out_reward(0.0)
        record.comparison = demo.compare()
        demo.finish()
        record.state = "finished"
    except KeyboardInterrupt:
        record.state = "interrupted"
        if report is not None:
            report.say(f"interrupted after {len(record.steps)} GRPO steps")
        return 130
    except BaseException:
        record.state = "failed"
        raise
    finally:
        record.total_s = time.time() - began_at
        traced.close()
        if report is not None:
            report.finish()
            if trace is not None:
                report.say(f"wrote {trace.path}, for ui.perfetto.dev")
        leave_ranks()
    is_whole_recipe = settings.steps >= DemoSettings.steps
    is_good = record.is_greedy_equal and (record.is_goal_met or not is_whole_recipe)
    return 0 if is_good else 1
