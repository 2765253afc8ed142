"""Bench prefill and decode end to end on the shapes of real models, against the peers.

    python bench/bench_e2e.py --device cuda --out bench/results/e2e.json

Random weights, greedy, EOS off. Prefill is a call for one token; decode is what a call for more
tokens takes longer. Tokens are gated first, in fp32 on two layers of each shape: a provider that
differs from HF there has times and no ratio. Each model runs in its own process; one that breaks
the device is named, and the cells that remain run without the provider that broke it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comparison import OURS
from e2e_models import Models
from engines import free_port, join
from gate import Tokens, agreement, first_difference
from parts import run_child
from report import write_json
from timing import describe_error, interleave, spread, wall_timer
from workloads import GPU_MODELS, TINY_MODELS, ModelShape, Workload

BROKEN_DEVICE = 17

# Measured copy bandwidth of the reference GPU (one H200), bytes a second.
CEILING_BYTES_PER_S = 4.3e12

# Share of the time budget by model, in the order they run; large ones are slower to build too.
SHARES = {"qwen3-0.6b": 0.27, "qwen3-1.7b": 0.3, "llama-3.1-8b": 0.43, "qwen3-tiny": 1.0}


@dataclass(frozen=True)
class Sizes:
    batches: tuple[int, ...]
    prompt_len: int
    new_tokens: int
    rounds: int


FULL = Sizes(batches=(1, 32, 128), prompt_len=512, new_tokens=32, rounds=3)
TINY = Sizes(batches=(1, 4), prompt_len=16, new_tokens=4, rounds=2)

# Passes over a model's batches: compiling takes minutes, so it comes when the rest is safe.
EAGER = (OURS, "hf_generate", "deepspeed_rollout", "deepspeed_rollout_graph")
COMPILED = (OURS, "hf_static_compile")
HF = ("hf_generate", "hf_static_compile")


class OutOfTimeError(RuntimeError):
    """A provider ran past its limit."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block after `seconds`; a hung device is the parent's to end."""

    def stop(signum: int, frame: Any) -> None:
        raise OutOfTimeError(f"no answer within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Cell:
    """What one batch size of one model showed, by provider."""

    name: str
    batch: int
    contestants: list[str]
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)


class Worker:
    """All cells of one model, written after each."""

    def __init__(self, shape: ModelShape, arguments: argparse.Namespace) -> None:
        self.shape = shape
        self.sizes = TINY if arguments.tiny else FULL
        self.device = arguments.device
        self.without = arguments.without
        self.torch_ops = tuple(arguments.torch_ops)
        self.end = time.monotonic() + arguments.budget_s
        self.out = arguments.out
        self.state: dict[str, Any] = {"gate": {}, "done": [], "rows": [], "running": ""}
        drain = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        self.timer = wall_timer(drain)

    def left(self) -> float:
        return self.end - time.monotonic()

    def save(self) -> None:
        self.out.write_text(json.dumps(self.state))

    def guarded(self, name: str, call: Callable[[], Any], limit_s: float) -> tuple[Any, str]:
        """Return a call's result, or why there is none; end the process if the device is gone."""
        # Saved first, so that the parent knows whom a crash or a hang belongs to.
        self.state["running"] = name
        self.save()
        try:
            with limited(limit_s):
                return call(), ""
        except Exception as error:
            text = f"failed: {describe_error(error)}"
        self.leave_broken_device(name, text)
        return None, text

    def leave_broken_device(self, name: str, text: str) -> None:
        """End the process where an error of `name` left the device unusable to it."""
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except Exception:
            self.state["running"] = name
            self.state["error"] = text
            self.save()
            # At once: every clean-up would call the device again.
            os._exit(BROKEN_DEVICE)

    def gate(self) -> None:
        """Compare every provider's fp32 greedy tokens with HF's on two layers of the shape."""
        shape = replace(self.shape, num_layers=2)
        workload = Workload(name="gate", model=shape, prompt_len=48, new_tokens=(12,) * 4)
        models = Models(shape, torch.float32, self.device, self.torch_ops)
        reference = models.provider("hf_generate", workload).run()
        for name in EAGER:
            if name in self.without or name == "hf_generate":
                continue
            tokens, failure = self.guarded(
                name, lambda name=name: models.provider(name, workload).run(), self.left()
            )
            difference = failure or first_difference(reference, tokens)
            self.state["gate"][name] = difference or "agrees"
            self.save()

    def passes(self) -> list[tuple[int, tuple[str, ...]]]:
        names = [(batch, EAGER) for batch in self.sizes.batches]
        return names + [(batch, COMPILED) for batch in self.sizes.batches]

    def run(self, done: list[str]) -> None:
        self.gate()
        models = Models(self.shape, torch.bfloat16, self.device, self.torch_ops)
        for batch, names in self.passes():
            cell = f"{self.shape.name} B={batch} {'compiled' if names == COMPILED else 'eager'}"
            if cell in done:
                continue
            if self.left() < (2 if self.device == "cpu" else 12):
                self.state["rows"].append({"cell": cell, "error": "skipped: time budget"})
            else:
                self.state["rows"] += self.cell(models, cell, batch, list(names))
            self.state["done"].append(cell)
            self.save()

    def cell(self, models: Models, cell: str, batch: int, names: list[str]) -> list[dict[str, Any]]:
        """Warm up and time prompts alone, then prompts with new tokens; return the cell's rows."""
        sizes = self.sizes
        short = Workload(
            name=cell, model=self.shape, prompt_len=sizes.prompt_len, new_tokens=(1,) * batch
        )
        long = replace(short, new_tokens=(1 + sizes.new_tokens,) * batch)
        result = Cell(name=cell, batch=batch, contestants=names)
        left_out = set(names) & set(self.without)
        result.failures = dict.fromkeys(left_out, "left out: it broke the device before")
        for phase, workload in (("short", short), ("long", long)):
            calls: dict[str, Callable[[], object]] = {}
            for name in names:
                if name in result.failures:
                    continue

                # Twice: the first call compiles, allocates or captures.
                def warm(name: str = name, workload: Workload = workload) -> tuple[Any, Any]:
                    provider = models.provider(name, workload)
                    provider.run()
                    return provider, provider.run()

                limit = min(self.left() - 1, 120.0 if name == "hf_static_compile" else 60.0)
                made, failure = self.guarded(name, warm, limit)
                if failure:
                    result.failures[name] = failure
                    continue
                provider, result.tokens[name] = made
                result.facts[name] = provider.facts()
                calls[name] = provider.run
            timed = interleave(calls, sizes.rounds, timer=self.timer, deadline=self.end - 2)
            result.seconds[phase] = timed.seconds
            for name, error in timed.errors.items():
                result.failures[name] = f"failed while timed: {error}"
                self.leave_broken_device(name, error)
        return self._rows(result)

    def _rows(self, cell: Cell) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        steps: dict[str, list[float]] = {}
        new_tokens, prompt_len = self.sizes.new_tokens, self.sizes.prompt_len
        reference = next((cell.tokens[each] for each in HF if each in cell.tokens), None)
        for name in cell.contestants:
            base: dict[str, Any] = {
                "cell": cell.name,
                "model": self.shape.name,
                "batch": cell.batch,
                "prompt_len": prompt_len,
                "provider": name,
                "gate": self.verdict(name),
            }
            if name in cell.failures:
                rows.append(base | {"error": cell.failures[name]})
                continue
            base |= cell.facts[name]
            if reference is not None:
                base["bf16_agreement_with_hf"] = agreement(reference, cell.tokens[name])
            prefill = cell.seconds["short"][name]
            one = spread(prefill).p50
            steps[name] = [(each - one) / new_tokens for each in cell.seconds["long"][name]]
            rows.append(base | _phase("prefill", prefill, cell.batch * prompt_len))
            decode = base | _phase("decode_step", steps[name], cell.batch)
            rows.append(decode | {"floor_ms": self._floor_ms(cell.batch)})
        for row in rows:
            if row["provider"] == OURS and row.get("phase") == "decode_step":
                row["speedup_over"] = self._ratios(steps)
        return rows

    def verdict(self, name: str) -> str:
        return self.state["gate"].get(name, "reference" if name in HF else "not run")

    def _ratios(self, steps: dict[str, list[float]]) -> dict[str, Any]:
        """Return our decode speed over each peer's, round by round, among those that agree."""
        if self.verdict(OURS) != "agrees":
            return {"none": f"our gate: {self.verdict(OURS)}"}
        pairs: dict[str, Any] = {}
        for name, theirs in steps.items():
            if name == OURS:
                continue
            if self.verdict(name) not in ("agrees", "reference"):
                pairs[name] = f"gate: {self.verdict(name)}"
                continue
            both = zip(steps[OURS], theirs, strict=False)
            pairs[name] = vars(spread([other / own for own, other in both]))
        return pairs

    def _floor_ms(self, batch: int) -> float | None:
        """Return the least milliseconds of a decode step: weights, keys and values, read once."""
        if self.device != "cuda":
            return None
        shape = self.shape
        context = self.sizes.prompt_len + self.sizes.new_tokens // 2
        a_token = 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * 2
        return (shape.weight_bytes(2) + batch * context * a_token) / CEILING_BYTES_PER_S * 1e3


def _phase(name: str, seconds: list[float], tokens: int) -> dict[str, Any]:
    middle = spread(seconds)
    return {
        "phase": name,
        "ms_p20": middle.p20 * 1e3,
        "ms_p50": middle.p50 * 1e3,
        "ms_p80": middle.p80 * 1e3,
        # Noise on a tiny model can make the longer call the shorter one.
        "tokens_per_s": tokens / middle.p50 if middle.p50 > 0 else None,
        "rounds": len(seconds),
    }


def supervise(arguments: argparse.Namespace) -> None:
    """Run each model in a process of its own, restarting it without whoever broke the device."""
    models = TINY_MODELS if arguments.tiny else GPU_MODELS
    end = time.monotonic() + arguments.budget_s
    parts: dict[str, Any] = {}
    share_left = sum(SHARES[name] for name in models)
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            budget = (end - time.monotonic()) * SHARES[name] / share_left
            share_left -= SHARES[name]
            parts[name] = _run_model(name, arguments, Path(folder), budget)
            content = {"torch_ops": arguments.torch_ops, "models": parts}
            write_json(arguments.out, content, arguments.device)
            for row in parts[name]["rows"]:
                print(_line(row), flush=True)


def _run_model(
    name: str, arguments: argparse.Namespace, folder: Path, budget_s: float
) -> dict[str, Any]:
    end = time.monotonic() + budget_s
    whole: dict[str, Any] = {"gate": {}, "rows": [], "done": [], "broken": []}
    without: list[str] = []
    while True:
        partial = folder / f"{name}.{len(whole['broken'])}.json"
        left = end - time.monotonic()
        command = [sys.executable, __file__, "--worker", name, "--device", arguments.device]
        command += ["--budget-s", str(left), "--out", str(partial)]
        command += ["--torch-ops", ",".join(arguments.torch_ops), "--without", ",".join(without)]
        command += ["--done", ",".join(whole["done"])] + (["--tiny"] if arguments.tiny else [])
        # The worker minds the budget itself; the margin is for one that can't any more.
        ended = run_child(command, left + 10)
        state = json.loads(partial.read_text()) if partial.exists() else {}
        whole["gate"] |= state.get("gate", {})
        whole["rows"] += state.get("rows", [])
        whole["done"] += state.get("done", [])
        if ended.code == 0:
            return whole
        how = "timed out" if ended.timed_out else f"exit {ended.code}"
        culprit = state.get("running", "")
        broken = {"provider": culprit, "how": how, "error": state.get("error", "")}
        whole["broken"].append(broken | {"tail": ended.tail[-800:]})
        if not culprit or culprit in without or end - time.monotonic() < 30:
            return whole
        without.append(culprit)


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['cell']:<32}{row.get('provider', ''):<26}{row['error']}"
    head = f"{row['cell']:<32}{row['provider']:<26}{row['phase']:<12}{row['ms_p50']:>10.2f} ms"
    state = f"attention {row['attention']}, compile {row['compile']}, graph {row['graph']}"
    return f"{head}  {state}, gate {row['gate']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--torch-ops", default="", help="comma separated ops on their torch path")
    parser.add_argument("--budget-s", type=float, default=270.0, help="of all models together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--without", default="", help=argparse.SUPPRESS)
    parser.add_argument("--done", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("torch_ops", "without", "done"):
        setattr(arguments, name, [part for part in getattr(arguments, name).split(",") if part])
    if not arguments.worker:
        supervise(arguments)
        return 0
    join(0, 1, free_port(), arguments.device)
    shape = (GPU_MODELS | TINY_MODELS)[arguments.worker]
    Worker(shape, arguments).run(arguments.done)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
