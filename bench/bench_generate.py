"""Compare our rollout with every peer on the same weights, prompts and real tokens.

    python bench/bench_generate.py --workload uniform_b16 --rounds 5 --dtype fp32 bf16

Tokens are gated first: in fp32 every provider must give HF generate's greedy tokens, or it has a
row that says where it differs and no speed. Then all run interleaved; ratios are taken round by
round. One CSV, and a JSON beside it with the command, the seconds and what each provider says of
itself.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from comparison import OURS, Contestant, Field, Outcome, rows_of
from engines import deepspeed_engine
from ours import tritonhybrid_rollout
from ranks import Job, compare_on_ranks
from report import ROOT, Row, table, write_csv, write_json
from workloads import DTYPES, WORKLOADS, Workload, build_model


class Weights:
    """One set of random weights, handed out as copies so that no provider alters another's."""

    def __init__(self, workload: Workload, dtype: str, device: str, rank: int) -> None:
        self.dtype = DTYPES[dtype]
        self._workload = workload
        self._device = device
        self._rank = rank
        # Made in fp32 and rounded: the gate's weights and the timed ones are the same draw.
        self.model = build_model(workload.model, torch.float32, device).to(self.dtype)
        self._engines: list[Any] = []

    def engine(self, zero: int) -> Any:
        engine = deepspeed_engine(copy.deepcopy(self.model), zero, self.dtype)
        self._engines.append(engine)
        return engine

    def close(self) -> None:
        """Free the engines: DeepSpeed keeps references that outlive the last use."""
        for engine in self._engines:
            engine.destroy()
        self._engines.clear()
        gc.collect()

    def where(self) -> dict[str, Any]:
        return {"rank": self._rank, "device": self._device}


def contestants(
    workload: Workload,
    dtype: str,
    rank: int,
    *,
    device: str,
    zeros: tuple[int, ...],
    chosen: tuple[str, ...],
) -> Field:
    """Return the contestants that make sense for a workload, HF generate first."""
    weights = Weights(workload, dtype, device, rank)
    everyone = [
        Contestant(
            "hf_generate", partial(peers.hf_generate, weights.model, workload, **weights.where())
        ),
        *_on_engines(weights, workload, zeros, device, rank),
    ]
    if workload.ranks == 1:
        everyone.extend(_on_the_module(weights, workload, device))
    reference, *others = everyone
    # A bracket in a name is a bracket, not a set of characters.
    patterns = [pattern.replace("[", "[[]") for pattern in chosen]
    kept = [each for each in others if any(fnmatch.fnmatch(each.name, one) for one in patterns)]
    return Field([reference, *kept], weights.close)


def _on_the_module(weights: Weights, workload: Workload, device: str) -> Iterator[Contestant]:
    on_module: list[tuple[str, Callable[..., Any], bool]] = [
        ("hf_sorted", peers.hf_sorted, workload.is_ragged),
        ("hf_shared_prefix", peers.hf_shared_prefix, workload.n > 1),
    ]
    for name, make, applies in on_module:
        if applies:
            yield Contestant(name, partial(make, weights.model, workload, device=device))
    yield Contestant(
        "transformers_generate_batch",
        lambda: peers.transformers_generate_batch(copy.deepcopy(weights.model), workload),
    )


def _on_engines(
    weights: Weights, workload: Workload, zeros: tuple[int, ...], device: str, rank: int
) -> Iterator[Contestant]:
    for zero in zeros:
        where = f"[zero{zero}]"
        # Two engines: wrapping ours changes `generate` of its module, which DeepSpeed's rollout
        # calls.
        yield Contestant(
            OURS + where,
            lambda zero=zero: tritonhybrid_rollout(weights.engine(zero), workload, rank=rank),
        )
        shared = _Once(partial(weights.engine, zero))
        modes: list[tuple[str, dict[str, bool], bool]] = [
            ("", {}, True),
            ("_continuous", {"continuous": True}, True),
            ("_continuous_repaired", {"continuous": True, "repaired": True}, True),
            ("_shared_prefill", {"shared_prefill": True}, workload.n > 1),
        ]
        if zero == 3:
            yield Contestant(
                "module_generate" + where,
                lambda shared=shared: peers.module_generate(shared(), workload, **weights.where()),
            )
        for suffix, mode, applies in modes:
            if applies:
                yield Contestant(
                    f"deepspeed_rollout{suffix}{where}",
                    lambda shared=shared, mode=mode: peers.deepspeed_rollout(
                        shared(), workload, **weights.where(), **mode
                    ),
                )


class _Once:
    """A value made at the first call and shared by the later ones."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: list[Any] = []

    def __call__(self) -> Any:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]


def run_workload(workload: Workload, dtype: str, arguments: argparse.Namespace) -> Outcome:
    several = workload.ranks > 1
    field = partial(
        contestants,
        device=arguments.device,
        # What several ranks show is gathering.
        zeros=(3,) if several else tuple(arguments.zero),
        chosen=tuple(arguments.providers),
    )
    job = Job(
        field_of=field,
        workload=workload,
        dtype=dtype,
        rounds=arguments.rounds,
        device=arguments.device,
        threads=1 if several else arguments.threads,
    )
    return compare_on_ranks(job, hang_s=arguments.hang_s)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["fp32"])
    parser.add_argument("--zero", nargs="+", type=int, choices=(0, 1, 2, 3), default=[0, 3])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of a rank; one where several run")
    parser.add_argument(
        "--providers", nargs="+", default=["*"], help="only those matching, beside hf_generate"
    )
    parser.add_argument("--hang-s", type=float, default=600.0, help="longest answer of a provider")
    parser.add_argument("--tiny", action="store_true", help="try the bench on a tiny model")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/generate.csv")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    workloads = [WORKLOADS[name] for name in arguments.workload or WORKLOADS]
    if arguments.tiny:
        workloads = [workload.shrunk() for workload in workloads]
    rows: list[Row] = []
    runs: list[dict[str, Any]] = []
    for workload in workloads:
        for dtype in arguments.dtype:
            outcome = run_workload(workload, dtype, arguments)
            new = rows_of(outcome, workload, dtype)
            rows.extend(new)
            runs.append({"workload": workload.name, "dtype": dtype} | vars(outcome))
            write_csv(arguments.out, rows, arguments.device)
            write_json(arguments.out.with_suffix(".json"), {"runs": runs}, arguments.device)
            print(table([row for row in new if row.metric != "greedy_agreement"]), flush=True)
    wrong = [row for row in rows if row.provider.startswith(OURS) and "failed" in row.metric]
    for row in wrong:
        print(f"{row.workload}: {row.provider} {row.metric}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
