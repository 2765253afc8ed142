"""The systems a user would otherwise pick, each called as well as its interface allows."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from gate import Tokens
from provider import Provider
from workloads import PAD_TOKEN, Workload

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD_TOKEN}

# Sizes of the hand-sorted baseline's static batches: an eighth of the long-tailed workload to a
# half.
SORTED_BATCHES = (4, 8, 16)


def _prompt_ids(workload: Workload, rank: int, device: str) -> torch.Tensor:
    return torch.tensor(workload.prompts(rank), device=device)


def _real(rows: torch.Tensor, workload: Workload) -> Tokens:
    """Cut each row after the prompt to its prescribed length."""
    completions = rows[:, workload.prompt_len :].tolist()
    return [row[:length] for row, length in zip(completions, workload.lengths(), strict=True)]


def _facts(model: Any, **extra: str) -> dict[str, str]:
    return {
        "attention": model.config._attn_implementation,
        "compile": "none",
        "graph": "none",
    } | extra


def hf_generate(
    model: Any, workload: Workload, *, rank: int = 0, device: str = "cpu", name: str = "hf_generate"
) -> Provider:
    """HF generate over the whole batch, every row to the longest."""
    ids = _prompt_ids(workload, rank, device).repeat_interleave(workload.n, dim=0)

    def run() -> Tokens:
        mask = torch.ones_like(ids)
        rows = model.generate(ids, attention_mask=mask, max_new_tokens=workload.longest, **GREEDY)
        return _real(rows, workload)

    return Provider(name=name, run=run, facts=lambda: _facts(model))


def hf_static_compile(model: Any, workload: Workload, *, device: str) -> Provider:
    """HF generate with its static cache, which compiles the decode step on CUDA."""
    ids = _prompt_ids(workload, 0, device).repeat_interleave(workload.n, dim=0)

    def run() -> Tokens:
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=workload.longest,
            cache_implementation="static",
            **GREEDY,
        )
        return _real(rows, workload)

    def facts() -> dict[str, str]:
        if device != "cuda":
            return _facts(model, compile="none (HF compiles on CUDA only)")
        return _facts(
            model, compile="HF automatic, mode reduce-overhead", graph="inductor CUDA graphs"
        )

    return Provider(name="hf_static_compile", run=run, facts=facts)


def hf_sorted(
    model: Any,
    workload: Workload,
    *,
    device: str = "cpu",
    batch_sizes: tuple[int, ...] = SORTED_BATCHES,
) -> Provider:
    """Static batches sorted by length: an oracle, since nobody knows lengths in advance.

    Args:
        batch_sizes: tried at the first call, which no one times; the fastest stays.
    """
    prompts = workload.prompts()
    order = sorted(range(workload.num_prompts), key=lambda index: workload.new_tokens[index])
    # One batch of all is hf_generate.
    sizes = [size for size in batch_sizes if size < len(prompts)] or [len(prompts)]
    seconds: dict[int, float] = {}

    def answer(size: int) -> Tokens:
        answers: Tokens = [[] for _ in range(workload.num_prompts * workload.n)]
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            ids = torch.tensor([prompts[index] for index in chosen], device=device)
            ids = ids.repeat_interleave(workload.n, dim=0)
            longest = max(workload.new_tokens[index] for index in chosen)
            rows = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, **GREEDY
            )
            completions = rows[:, workload.prompt_len :].tolist()
            samples = [(index, sample) for index in chosen for sample in range(workload.n)]
            for (index, sample), completion in zip(samples, completions, strict=True):
                answers[index * workload.n + sample] = completion[: workload.new_tokens[index]]
        return answers

    def run() -> Tokens:
        if not seconds and len(sizes) > 1:
            answer(sizes[0])
            for size in sizes:
                start = time.perf_counter()
                answer(size)
                seconds[size] = time.perf_counter() - start
        return answer(best())

    def best() -> int:
        return min(sizes, key=lambda size: seconds.get(size, 0.0))

    def facts() -> dict[str, str]:
        tried = ", ".join(f"{size}: {each:.3f} s" for size, each in seconds.items())
        return _facts(model, batch_size=str(best()), batch_sizes_tried=tried)

    return Provider(name="hf_sorted", run=run, facts=facts)


def hf_shared_prefix(model: Any, workload: Workload, *, device: str = "cpu") -> Provider:
    """One prefill a prompt, its cache repeated by hand for the n samples, then HF generate."""
    from transformers import DynamicCache

    prompt = _prompt_ids(workload, 0, device)
    ids = prompt.repeat_interleave(workload.n, dim=0)
    # transformers 5.24 calls past_key_values cache.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    @torch.no_grad()
    def run() -> Tokens:
        cache = DynamicCache(config=model.config)
        # generate() computes the last prompt token of every sample, so the cache stops before it.
        model.base_model(prompt[:, :-1], use_cache=True, **{name: cache})
        cache.batch_repeat_interleave(workload.n)
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=workload.longest,
            **{name: cache},
            **GREEDY,
        )
        return _real(rows, workload)

    return Provider(name="hf_shared_prefix", run=run, facts=lambda: _facts(model))


def transformers_generate_batch(model: Any, workload: Workload) -> Provider:
    """transformers' continuous batching, with each request's own length.

    Args:
        model: its own copy, since it switches the model to its paged attention.

    The manager stays up between calls, as a trainer would keep it: ``generate_batch`` itself
    starts and stops one a call, and stopping alone takes a second.
    """
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    prompts = [prompt for prompt in workload.prompts() for _ in range(workload.n)]
    lengths = workload.lengths()
    page_size = 64
    pages_each = -(-(workload.prompt_len + workload.longest) // page_size)
    attention = model.config._attn_implementation
    # -1 is its spelling of "no EOS".
    greedy = GenerationConfig(
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=PAD_TOKEN,
        max_new_tokens=workload.longest,
    )
    # Sized to the workload: by default it claims 90 % of the machine's memory for its cache.
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=pages_each * len(prompts) + 8,
        max_batch_tokens=max(512, 2 * workload.prompt_len),
    )
    manager = model.init_continuous_batching(
        generation_config=greedy, continuous_batching_config=config
    )

    @torch.no_grad()
    def run() -> Tokens:
        if not manager.is_running():
            manager.warmup()
            manager.start()
        names = [
            manager.add_request(prompt, max_new_tokens=length)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        answers: dict[str, list[int]] = {}
        while len(answers) < len(names):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError(
                        f"generate_batch stopped after {len(answers)} of {len(names)} requests"
                    )
            elif result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"generate_batch: {result.error}")
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[name] for name in names]

    def close() -> None:
        if manager.is_running():
            manager.stop(block=True, timeout=5)

    return Provider(
        name="transformers_generate_batch",
        run=run,
        facts=lambda: _facts(model, attention=f"paged|{attention}", graph="its own default"),
        close=close,
    )


def module_generate(engine: Any, workload: Workload, *, rank: int, device: str) -> Provider:
    """``engine.module.generate`` on partitioned weights: every layer gathered for every token."""
    inner = hf_generate(engine.module, workload, rank=rank, device=device)
    return Provider(name="module_generate", run=inner.run, facts=inner.facts)


def deepspeed_rollout(
    engine: Any,
    workload: Workload,
    *,
    rank: int = 0,
    device: str = "cpu",
    continuous: bool = False,
    shared_prefill: bool = False,
    graph: bool = False,
    repaired: bool = False,
) -> Provider:
    """DeepSpeed's HybridEngineRollout.

    Args:
        continuous: its continuous batching (experimental, greedy), 16 rows.
        shared_prefill: its shared prefill of the n samples.
        graph: its CUDA-graph capture.
        repaired: give its static cache the ``get_query_offset`` that transformers >= 5.2x asks
            of a cache, for the call alone: without it, continuous batching does not run there.
    """
    from deepspeed.runtime.rollout import HybridEngineRollout, RolloutRequest, SamplingConfig
    from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRolloutConfig

    tokenizer = types.SimpleNamespace(pad_token_id=PAD_TOKEN, eos_token_id=None)
    config = HybridEngineRolloutConfig(use_graph_capture=graph, use_shared_prefill=shared_prefill)
    rollout = HybridEngineRollout(engine, tokenizer, config)
    ids = _prompt_ids(workload, rank, device)
    sampling = SamplingConfig(
        max_new_tokens=workload.longest,
        temperature=0.0,
        n_samples_per_prompt=workload.n,
        continuous_batch_size=min(16, workload.num_prompts) if continuous else None,
    )

    def run() -> Tokens:
        with _query_offset() if repaired else contextlib.nullcontext():
            batch = rollout.generate(RolloutRequest(ids, torch.ones_like(ids)), sampling)
        return _real(batch.input_ids, workload)

    modes = {
        "_continuous": continuous,
        "_shared_prefill": shared_prefill,
        "_graph": graph,
        "_repaired": repaired,
    }
    name = "deepspeed_rollout" + "".join(suffix for suffix, on in modes.items() if on)
    state = "DeepSpeed CUDA graph" if graph else "none"
    return Provider(name=name, run=run, facts=lambda: _facts(engine.module, graph=state))


@contextlib.contextmanager
def _query_offset() -> Iterator[None]:
    from deepspeed.utils.static_cache import DeepSpeedStaticCache

    if hasattr(DeepSpeedStaticCache, "get_query_offset"):
        yield
        return
    # The mask it passes already hides what lies ahead, so the offset may not hide more.
    DeepSpeedStaticCache.get_query_offset = lambda cache, layer_idx=0: cache.get_seq_length(
        layer_idx
    )
    try:
        yield
    finally:
        del DeepSpeedStaticCache.get_query_offset
