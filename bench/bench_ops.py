"""Bench every op on the shapes of real models: us, GB/s, TFLOP/s, % of the device's ceilings.

    python bench/bench_ops.py --device cuda --out bench/results/ops.json

Each op runs in its own process with a time limit; its result is compared with its torch path
first. Inputs are random and rotate through more memory than the L2 cache holds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from device_timing import eager_us, graph_us, host_us
from op_cases import OpCase, cases
from parts import run_child
from report import write_json
from timing import describe_error, spread
from workloads import GPU_MODELS, TINY_MODELS

# Measured on the reference GPU (one H200): device-to-device copy, and a bf16 product of random
# data. A percentage is of these whatever the device; the JSON names it.
CEILING_BYTES_PER_S = 4.3e12
CEILING_FLOPS_PER_S = 788e12

# Rotate through twice the reference GPU's L2.
ROTATE_BYTES = 2 * 60 * 2**20
MAX_SETS = 64

# Relative L2 distance from the torch path in bf16; the op's tests are the strict ones.
TOLERANCE = 2e-2

# Torch paths made for the CPU: they read lengths on the host, so no graph can hold them.
READS_LENGTHS = ("attention_varlen", "paged_attention_decode")


def bench_case(case: OpCase, provider: str, device: str, replays: int) -> dict[str, Any]:
    """Return the figures of one op on one case, or why there are none."""
    module = import_module(f"tritonhybrid_kernels.{case.op}")
    op = getattr(module, case.op + ("" if provider == "triton" else "_ref"))
    result: dict[str, Any] = {"op": case.op, "case": case.label, "provider": provider}
    if provider == "triton":
        torch.manual_seed(0)
        expected = case.make().call(getattr(module, case.op + "_ref"))
        torch.manual_seed(0)
        distance = _distance(case.make().call(op), expected)
        result["distance"] = distance
        if not distance <= TOLERANCE:
            return result | {"error": f"gate failed: distance {distance:.2e} from the torch path"}
    count = max(3, min(MAX_SETS, math.ceil(ROTATE_BYTES / case.bytes) + 1))
    if device == "cpu":
        count = 1
    if provider == "sdpa":
        calls = [case.sdpa() for _ in range(count)]
    else:
        calls = [partial(case.make().call, op) for _ in range(count)]
    if device == "cpu":
        calls[0]()
        micros, how = host_us(calls, replays), "host clock"
    elif provider == "torch" and case.op in READS_LENGTHS:
        micros, how = eager_us(calls, replays), "launched one by one: it reads lengths on the host"
    else:
        micros, how = graph_us(calls, replays), "graph replay"
    return (
        result
        | _figures(case, micros, device)
        | {
            "timing": how,
            "sets": count,
            "beyond_l2": count * case.bytes >= ROTATE_BYTES / 2,
        }
    )


def _figures(case: OpCase, micros: list[float], device: str) -> dict[str, Any]:
    middle = spread(micros)
    seconds = middle.p50 / 1e6
    floor_bytes = case.bytes / CEILING_BYTES_PER_S
    floor_flops = case.flops / CEILING_FLOPS_PER_S
    floor = max(floor_bytes, floor_flops)
    return {
        "us_p20": middle.p20,
        "us_p50": middle.p50,
        "us_p80": middle.p80,
        "gb_per_s": case.bytes / seconds / 1e9,
        "tflop_per_s": case.flops / seconds / 1e12,
        "bound": "memory" if floor_bytes >= floor_flops else "compute",
        "floor_us": floor * 1e6 if device == "cuda" else None,
        "percent_of_ceiling": 100 * floor / seconds if device == "cuda" else None,
    }


def _distance(results: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest relative L2 distance; for token ids, the share that differ, halved.

    Halved: where a sampled token changes on a rounding, that is one row, not an error of scale;
    with the tolerance it allows one row in 25.
    """
    worst = 0.0
    tokens_moved = False
    for got, want in zip(results, expected, strict=True):
        if got.dtype == torch.int64:
            share = float((got != want).double().mean())
            tokens_moved = share > 0
            distance = share / 2
        elif tokens_moved:
            # Log-probabilities of other tokens are other numbers.
            continue
        else:
            scale = want.double().norm().clamp_min(1e-30)
            distance = float((got.double() - want.double()).norm() / scale)
        worst = distance if not distance <= worst else worst
    return worst


def work(arguments: argparse.Namespace) -> None:
    """Bench the ops named, writing after every case."""
    tiny = arguments.tiny
    shapes = (
        list(TINY_MODELS.values())
        if tiny
        else [GPU_MODELS["llama-3.1-8b"], GPU_MODELS["qwen3-0.6b"]]
    )
    providers = ["torch"] if arguments.device == "cpu" else ["triton", "torch"]
    figures: list[dict[str, Any]] = []
    for op in arguments.ops:
        chosen = [each for each in providers if each == "torch" or op not in arguments.torch_ops]
        every = cases(
            op,
            shapes,
            torch.bfloat16,
            arguments.device,
            decode_tokens=(1, 4) if tiny else (1, 32, 128),
            prefill_tokens=(16,) if tiny else (4096,),
        )
        for case in every:
            for provider in chosen + (["sdpa"] if case.sdpa else []):
                try:
                    result = bench_case(case, provider, arguments.device, 5 if tiny else 30)
                except Exception as error:
                    result = {"op": op, "case": case.label, "provider": provider}
                    result["error"] = describe_error(error)
                figures.append(result)
                arguments.out.write_text(json.dumps(figures))


def supervise(arguments: argparse.Namespace) -> None:
    """Run each op in its own process (all in one for a dry run) within the time budget."""
    groups = [arguments.ops] if arguments.tiny else [[op] for op in arguments.ops]
    end = time.monotonic() + arguments.budget_s
    figures: list[dict[str, Any]] = []
    ended_how: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            left = end - time.monotonic()
            if left < 5:
                ended_how |= dict.fromkeys(group, "skipped: time budget")
                continue
            partial = Path(folder) / f"{group[0]}.json"
            command = [sys.executable, __file__, "--worker", "--device", arguments.device]
            command += ["--out", str(partial), "--ops", *group]
            command += ["--torch-ops", ",".join(arguments.torch_ops)]
            command += ["--tiny"] if arguments.tiny else []
            ended = run_child(command, left if arguments.tiny else min(arguments.limit_s, left))
            done = "ended" if ended.code == 0 else f"crashed (exit {ended.code}): {ended.tail}"
            done = f"timed out after {ended.seconds:.0f} s" if ended.timed_out else done
            ended_how |= dict.fromkeys(group, done)
            if partial.exists():
                figures += json.loads(partial.read_text())
            content = {
                "ceilings": {
                    "bytes_per_s": CEILING_BYTES_PER_S,
                    "flops_per_s": CEILING_FLOPS_PER_S,
                },
                "torch_ops": arguments.torch_ops,
                "ended": ended_how,
                "figures": figures,
            }
            write_json(arguments.out, content, arguments.device)
            for line in figures[-20:] if not arguments.tiny else figures:
                if line["op"] in group:
                    print(_line(line), flush=True)


def _line(figure: dict[str, Any]) -> str:
    head = f"{figure['op']:<24}{figure['case']:<44}{figure['provider']:<8}"
    if "error" in figure:
        return head + figure["error"]
    share = figure["percent_of_ceiling"]
    percent = f"{share:5.1f} % of {figure['bound']} ceiling" if share is not None else ""
    return head + (
        f"{figure['us_p50']:>10.1f} us {figure['gb_per_s']:>8.1f} GB/s "
        f"{figure['tflop_per_s']:>8.3f} TFLOP/s {percent}"
    )


def main() -> int:
    from tritonhybrid_kernels.ops import OP_NAMES

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--ops", nargs="+", choices=OP_NAMES, default=list(OP_NAMES))
    parser.add_argument("--torch-ops", default="", help="comma separated; not benched in Triton")
    parser.add_argument("--limit-s", type=float, default=40.0, help="of one op")
    parser.add_argument("--budget-s", type=float, default=130.0, help="of all ops together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.torch_ops = [op for op in arguments.torch_ops.split(",") if op]
    if arguments.worker:
        work(arguments)
    else:
        supervise(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
