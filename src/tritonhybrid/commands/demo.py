"""``tritonhybrid demo``: watch a model learn from its own rollouts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tritonhybrid.demo.settings import DemoSettings
from tritonhybrid.errors import ConfigError, explain


def add_parser(commands: Any) -> None:
    """Add the command and its options.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "demo",
        help="train a small model by reinforcement learning, about two minutes on a CPU",
        description=(
            "Warm up a small Llama on a noisy task, then raise its verified reward with GRPO, "
            "sampling from the DeepSpeed engine that trains it."
        ),
    )
    parser.add_argument("--zero", type=int, choices=range(4), default=3, help="ZeRO stage (3)")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="processes (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--steps", type=int, default=DemoSettings.steps, help=f"GRPO steps ({DemoSettings.steps})"
    )
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, prompts, samples (0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=DemoSettings.out,
        help=f"directory of metrics.json and reward.png ({DemoSettings.out})",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write every rollout's steps and times as a trace for ui.perfetto.dev; two ranks "
        "write calls.rank0.json and calls.rank1.json for calls.json",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        options: What :func:`add_parser` defined, and ``began_at``.

    Returns:
        Exit code.

    Raises:
        ConfigError: No steps are asked for, the device is not there, --out is a file, or
            --trace is none.
    """
    from tritonhybrid.call_trace import check_trace_path
    from tritonhybrid.demo.launch import launch
    from tritonhybrid.local_engine import choose_device

    if options.steps < 1:
        raise ConfigError(
            explain(
                "The demo takes at least one GRPO step",
                expected="--steps >= 1",
                got=options.steps,
                hint="Leave --steps out for the whole recipe.",
            )
        )
    in_the_way = [path for path in (options.out, *options.out.parents) if path.is_file()]
    if in_the_way:
        raise ConfigError(
            explain(
                "--out is a directory, made where it is missing",
                expected="no file by that name",
                got=f"the file {in_the_way[0]}",
                hint="Name another directory.",
            )
        )
    if options.trace is not None:
        check_trace_path(options.trace)
    settings = DemoSettings(
        zero=options.zero,
        ranks=options.ranks,
        device=choose_device(options.device, num_ranks=options.ranks),
        steps=options.steps,
        seed=options.seed,
        out=options.out,
        trace=options.trace,
    )
    return launch(settings, options.began_at)
