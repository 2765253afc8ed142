"""``tritonhybrid generate``: sample from a model on disk, through a DeepSpeed engine."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritonhybrid.hf_peer import HfPeer
    from tritonhybrid.model_files import ModelFiles
    from tritonhybrid.rollout_output import Completion
    from tritonhybrid.sampling_params import SamplingParams

COMPARISON_ROUNDS = 3


def add_parser(commands: Any) -> None:
    """Add the command and its options.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "generate",
        help="sample from a Hugging Face model directory or a GGUF file",
        description=(
            "Put a causal language model under a DeepSpeed engine and sample from it, as a "
            "training run would. A GGUF file is converted on its first use and kept in the "
            "user's cache."
        ),
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR_OR_GGUF")
    parser.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be repeated"
    )
    parser.add_argument("--zero", type=int, choices=range(4), default=3, help="ZeRO stage (3)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: what the model's config names, bfloat16 for a GGUF file",
    )
    parser.add_argument("--n", type=int, default=1, help="completions a prompt (1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(64)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (0.7)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(1.0)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the samples (0)")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="wrap prompts in the chat template (default: where the tokenizer has one)",
    )
    parser.add_argument(
        "--compare-hf",
        action="store_true",
        help="also run HF's generate: agreement of greedy tokens, tokens/s of both",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write the calls' steps and times as a trace for ui.perfetto.dev",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Sample and print.

    Args:
        options: What :func:`add_parser` defined.

    Returns:
        Exit code: 0; 1 when ``--compare-hf`` finds another greedy token in float32.

    Raises:
        ConfigError: The model can't be read, or an option is out of range.
        UnsupportedModelError: It is no causal language model.
    """
    from tritonhybrid.call_trace import check_trace_path
    from tritonhybrid.local_engine import LocalEngineConfig, choose_device, hush
    from tritonhybrid.model_files import ModelFiles
    from tritonhybrid.sampling_params import SamplingParams

    # Everything that can be refused is refused before the weights are read.
    sampling = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        n=options.n,
        seed=options.seed,
    )
    if options.trace is not None:
        check_trace_path(options.trace)
    device = choose_device(options.device)
    hush()
    files = ModelFiles.find(
        options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    engine_config = LocalEngineConfig(zero_stage=options.zero, dtype=files.dtype, device=device)

    import tritonhybrid
    from tritonhybrid.local_engine import build_engine, join_ranks, leave_ranks

    tokenizer = files.load_tokenizer()
    prompts = [encode(tokenizer, text, chat=options.chat) for text in options.prompt]
    with tempfile.TemporaryDirectory(prefix="tritonhybrid-") as scratch:
        join_ranks(0, 1, device, Path(scratch) / "rendezvous")
        try:
            engine = tritonhybrid.wrap(
                build_engine(files.load_model(), engine_config), tokenizer=tokenizer
            )
            engine.eval()
            trace = engine.trace(options.trace) if options.trace is not None else nullcontext()
            with trace:
                output = engine.rollout(prompts, sampling)
                for completion in output.completions:
                    _show(completion, options.prompt, options.n)
                _say_stats(output.stats, files)
                if not options.compare_hf:
                    return 0
                return _compare(engine, files, prompts, sampling)
        finally:
            leave_ranks()


def encode(tokenizer: Any, text: str, *, chat: bool | None = None) -> list[int]:
    """Turn a prompt into token ids.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The prompt.
        chat: Wrap it as a user's message in the chat template; None does so where there is
            a template.

    Raises:
        ConfigError: A chat template is asked for and there is none.
    """
    from tritonhybrid.errors import ConfigError, explain

    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError(
            explain(
                "--chat uses the tokenizer's chat template",
                expected="a tokenizer that has one",
                got="none",
                hint="Leave --chat out.",
            )
        )
    if has_template if chat is None else chat:
        message = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])
    return list(tokenizer(text)["input_ids"])


def _show(completion: Completion, texts: list[str], num_samples: int) -> None:
    if completion.sample_index == 0:
        _say(f"\n>>> {texts[completion.prompt_index]}")
    mark = f"[{completion.sample_index}] " if num_samples > 1 else ""
    logprob = sum(completion.logprobs) / max(len(completion.logprobs), 1)
    _say(f"{mark}{(completion.text or '').strip()}")
    _say(
        f"    ({len(completion.token_ids)} tokens, {completion.finish_reason}, "
        f"mean logprob {logprob:.2f})"
    )


def _say_stats(stats: Any, files: ModelFiles) -> None:
    _say(f"\nin {files.dtype}: {stats.summary()}")
    for note in stats.notes:
        _say(f"note: {note}")


def _compare(
    engine: Any, files: ModelFiles, prompts: list[list[int]], sampling: SamplingParams
) -> int:
    from tritonhybrid.hf_peer import Agreement, HfPeer, Speed
    from tritonhybrid.sampling_params import SamplingParams

    peer: HfPeer = HfPeer(files.load_model().to(engine.device))
    greedy = SamplingParams(max_new_tokens=sampling.max_new_tokens, temperature=0.0)
    ours, theirs = Speed(), Speed()
    # The first round of each fills caches and is not counted.
    mine = engine.rollout(prompts, greedy).completions
    equal = Agreement.between([done.token_ids for done in mine], peer.generate(prompts, greedy))
    for _ in range(COMPARISON_ROUNDS):
        begin = time.perf_counter()
        done = engine.rollout(prompts, greedy).completions
        ours.add([completion.token_ids for completion in done], time.perf_counter() - begin)
        peer.timed(prompts, greedy, theirs)
    _say(f"greedy tokens equal to HF's: {equal}")
    _say(
        f"greedy, {len(prompts)} prompt(s): rollout {ours.tokens_per_s:.1f} tokens/s, "
        f"HF generate {theirs.tokens_per_s:.1f} tokens/s"
    )
    if equal.is_whole:
        return 0
    if files.dtype == "float32":
        _say("float32 greedy tokens must be HF's: this is a defect, please report it")
        return 1
    _say(f"in {files.dtype} rounding may settle a near tie differently; float32 is the exact test")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
