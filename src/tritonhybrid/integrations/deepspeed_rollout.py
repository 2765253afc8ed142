"""DeepSpeed's rollout interface over a wrapped engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.rollout.base import (
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    SamplingConfig,
)

from tritonhybrid.containers.parts import causal_model
from tritonhybrid.engine import HybridEngine
from tritonhybrid.errors import ConfigError, EngineStateError, explain
from tritonhybrid.integrations.generation_config import sampling_params
from tritonhybrid.rollout_output import Completion
from tritonhybrid.stats import RolloutStats

# DeepSpeed's settings that a paged cache meets as it is: samples of a prompt share its pages, a
# page is free as soon as its row has ended, and no row has to stand beside another.
_MET_BY_PAGES = ("align_decode_fronts", "enable_cache_trimming", "use_shared_prefill")
_CFG_FIELDS = (
    *_MET_BY_PAGES,
    "continuous_cache_capacity",
    "enable_profiling",
    "engine",
    "use_graph_capture",
)


@dataclass
class TritonRolloutBatch(RolloutBatch):  # type: ignore[misc]
    """DeepSpeed's batch with what a trainer would otherwise compute again.

    Args:
        logprobs: [B * n, Tp + Tr] float32, of the distribution sampled from; 0
            outside the response.
        raw_logprobs: The same at temperature 1, unfiltered.
    """

    logprobs: torch.Tensor
    raw_logprobs: torch.Tensor


class TritonRollout(RolloutEngine):  # type: ignore[misc]
    """A ``RolloutEngine`` that samples with EOS, for n > 1 and on every ZeRO stage.

    Args:
        engine: From ``tritonhybrid.wrap``.
        tokenizer: Gives pad and EOS ids (EOS an id, several or None; pad falls back to EOS),
            read at each call.
        cfg: DeepSpeed's RolloutConfig or HybridEngineRolloutConfig, an object or dict with
            their fields, or None. ``enable_profiling`` fills :meth:`get_last_profile`;
            ``use_graph_capture`` needs an engine wrapped with ``enable_cuda_graph``;
            ``use_shared_prefill``, ``align_decode_fronts`` and ``enable_cache_trimming`` ask
            for what a paged cache does anyway; ``continuous_cache_capacity`` is refused.

    Raises:
        ConfigError: (a ValueError) The tokenizer has neither a pad nor an EOS id, or a
            setting of ``cfg`` can't be honoured.
        EngineStateError: The engine is not wrapped.
    """

    name = "tritonhybrid"

    def __init__(self, engine: HybridEngine, tokenizer: Any, cfg: Any = None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._special_ids()
        if not isinstance(engine, HybridEngine):
            raise EngineStateError(
                explain(
                    "TritonRollout generates with a wrapped engine",
                    expected="what tritonhybrid.wrap returned",
                    got=type(engine).__name__,
                    hint="Call tritonhybrid.wrap(engine) first.",
                )
            )
        self.enable_profiling = _check_cfg(cfg, engine)
        self._last_profile: dict[str, Any] | None = None

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> TritonRolloutBatch:
        """Sample ``n_samples_per_prompt`` responses a prompt.

        With ZeRO-3 every rank must call this together, with no prompts if it has none. The
        noise is the engine's own, as ``engine.rollout`` has it: torch's generators are not
        touched. What the model's generation_config says of sampling beyond ``sampling`` (a
        repetition penalty, min_p, ...) holds here as in ``module.generate``; its EOS doesn't.

        Args:
            request: Left-padded prompts [B, Tp] and their mask.
            sampling: temperature <= 0 is greedy, top_k <= 0 off. ``continuous_batch_size``
                bounds the rows in flight where the engine's ``max_num_seqs`` doesn't already;
                without it batching is continuous all the same.

        Returns:
            Rows grouped by prompt, on the prompts' device and in their dtype;
            ``response_start_idx`` is Tp; the prompt keeps its mask; the first EOS is kept
            and attended; what follows it is padding with mask 0. A sampled pad token that is
            no EOS is attended like any other. The mask is int64; with
            ``continuous_batch_size`` it has the request's dtype, as in DeepSpeed.

        Raises:
            ConfigError: (a ValueError) A prompt is empty or a value out of range.
        """
        start = time.perf_counter()
        pad, ends = self._special_ids()
        for name in ("n_samples_per_prompt", "continuous_batch_size"):
            _check_count(name, getattr(sampling, name))
        params = sampling_params(
            causal_model(self.engine.module).generation_config,
            settled={
                # NaN is no temperature at all, and refused as one.
                "do_sample": not sampling.temperature <= 0,
                "eos_token_id": ends,
                "max_new_tokens": sampling.max_new_tokens,
                # DeepSpeed generates with EOS off, so neither ever held an end back.
                "min_length": None,
                "min_new_tokens": None,
                "num_return_sequences": sampling.n_samples_per_prompt,
                "temperature": sampling.temperature,
                "top_k": max(sampling.top_k, 0),
                "top_p": sampling.top_p,
            },
        )
        prepared = time.perf_counter()
        out = self.engine.rollout(
            request.prompt_ids,
            params,
            attention_mask=request.prompt_attention_mask,
            max_num_seqs=sampling.continuous_batch_size,
        )
        generated = time.perf_counter()
        is_continuous = sampling.continuous_batch_size is not None
        mask_dtype = request.prompt_attention_mask.dtype if is_continuous else torch.int64
        batch = _batch(request, out.completions, pad, mask_dtype)
        if self.enable_profiling:
            times = (prepared - start, generated - prepared, time.perf_counter() - generated)
            self._last_profile = _profile(request, sampling, out.stats, batch, times)
            if is_continuous:
                self._last_profile |= _continuous_profile(sampling, out.stats, batch, self.engine)
        return batch

    def sync_weights(self, step: int) -> None:
        """Nothing to push: the weights are the trainer's own."""

    def shutdown(self) -> None:
        """Give the cache and the ZeRO-3 arena back; a later ``generate`` makes them anew."""
        # An unwrapped engine has given both back already.
        if isinstance(self.engine, HybridEngine):
            self.engine.release_inference_cache()

    def get_last_profile(self) -> dict[str, Any] | None:
        """DeepSpeed's profile of the latest ``generate``, from ``engine.stats``.

        Returns:
            DeepSpeed's keys, times in milliseconds; None without ``enable_profiling`` or
            before the first call. A forward's time includes its sampling and is None where
            HF's own loop served the call. ``num_generated_tokens`` and ``tokens_per_second``
            count what was returned, without padding. With ``continuous_batch_size``
            ``active_batch_size`` is the most rows that may have been in flight,
            ``scheduler_overhead_ms`` what is left of the generation beside steps, gathering
            and binding, ``cache_management_overhead_ms`` 0: no key or value is ever moved.
        """
        return self._last_profile

    def _special_ids(self) -> tuple[int, list[int]]:
        """The padding token and the ends, as the tokenizer names them now."""
        eos = self.tokenizer.eos_token_id
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        pad = self.tokenizer.pad_token_id
        if pad is None and ends:
            pad = ends[0]
        if pad is None:
            raise ConfigError(
                explain(
                    "A rollout batch needs a padding token",
                    expected="a tokenizer with pad_token_id or eos_token_id",
                    got="neither",
                    hint="Set tokenizer.pad_token_id.",
                )
            )
        return int(pad), ends


def _batch(
    request: RolloutRequest, completions: list[Completion], pad: int, mask_dtype: torch.dtype
) -> TritonRolloutBatch:
    prompts, mask = request.prompt_ids, request.prompt_attention_mask
    device, width = prompts.device, prompts.shape[1]
    longest = max((len(c.token_ids) for c in completions), default=0)
    shape = (len(completions), width + longest)
    ids = torch.full(shape, pad, dtype=prompts.dtype, device=device)
    attended = torch.zeros(shape, dtype=mask_dtype, device=device)
    logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
    raw = torch.zeros_like(logprobs)
    for row, completion in enumerate(completions):
        span = slice(width, width + len(completion.token_ids))
        ids[row, :width] = prompts[completion.prompt_index]
        attended[row, :width] = mask[completion.prompt_index].to(mask_dtype)
        ids[row, span] = torch.tensor(completion.token_ids, dtype=ids.dtype, device=device)
        attended[row, span] = 1
        logprobs[row, span] = torch.tensor(completion.logprobs, device=device)
        raw[row, span] = torch.tensor(completion.raw_logprobs, device=device)
    return TritonRolloutBatch(
        input_ids=ids,
        attention_mask=attended,
        response_start_idx=torch.full((len(completions),), width, device=device),
        logprobs=logprobs,
        raw_logprobs=raw,
    )


def _profile(
    request: RolloutRequest,
    sampling: SamplingConfig,
    stats: RolloutStats,
    batch: RolloutBatch,
    times: tuple[float, float, float],
) -> dict[str, Any]:
    """DeepSpeed's keys of a profile; ``times`` are before, in and after the rollout, in s."""
    expansion_ms, generation_ms, post_processing_ms = (1000 * seconds for seconds in times)
    total_ms = sum(times) * 1000
    # HF's own loop doesn't tell its steps apart.
    is_timed = stats.path != "hf"
    prefill_ms, decode_ms = 1000 * stats.prefill_s, 1000 * stats.decode_s
    in_forwards_ms = prefill_ms + decode_ms if is_timed else 0.0
    return {
        "prompt_expansion_ms": expansion_ms,
        "generation_ms": generation_ms,
        "prefill_forward_ms": prefill_ms if is_timed else None,
        "decode_forward_ms": decode_ms if is_timed else None,
        "generation_overhead_ms": max(0.0, generation_ms - in_forwards_ms),
        "num_decode_forwards": stats.num_decode_steps,
        "post_processing_ms": post_processing_ms,
        "total_ms": total_ms,
        "num_generated_tokens": stats.completion_tokens,
        "tokens_per_second": 1000 * stats.completion_tokens / total_ms if total_ms > 0 else 0.0,
        "batch_size": request.prompt_ids.shape[0],
        "num_samples_per_prompt": sampling.n_samples_per_prompt,
        "prompt_length": request.prompt_ids.shape[1],
        "response_length": batch.seq_len - request.prompt_ids.shape[1],
    }


def _continuous_profile(
    sampling: SamplingConfig, stats: RolloutStats, batch: RolloutBatch, engine: HybridEngine
) -> dict[str, Any]:
    """The keys that DeepSpeed's continuous mode adds."""
    around_s = stats.gather_s + stats.bind_s + stats.prefill_s + stats.decode_s
    slots = min(sampling.continuous_batch_size, engine.hybrid_config.max_num_seqs)
    return {
        "num_prefill_forwards": stats.num_prefill_steps,
        "scheduler_overhead_ms": max(0.0, 1000 * (stats.total_s - around_s)),
        "cache_management_overhead_ms": 0.0,
        "active_batch_size": min(batch.batch_size, slots),
        "continuous_batch_size": sampling.continuous_batch_size,
    }


def _check_cfg(cfg: Any, engine: HybridEngine) -> bool:
    """Honour DeepSpeed's settings or refuse them by name; returns whether to profile."""
    given = _named(cfg)
    unknown = sorted(set(given) - set(_CFG_FIELDS))
    if unknown:
        raise _refusal(unknown[0], f"one of {', '.join(_CFG_FIELDS)}", "an unknown name", "it out")
    if given.get("engine", "hybrid_engine") not in ("hybrid_engine", TritonRollout.name):
        raise _refusal(
            "engine", f"'hybrid_engine' or '{TritonRollout.name}'", repr(given["engine"]), "it out"
        )
    if given.get("continuous_cache_capacity") is not None:
        raise _refusal(
            "continuous_cache_capacity",
            "None: the cache has pages, not columns",
            given["continuous_cache_capacity"],
            "it out and bound the cache with wrap(engine, config={'kv_cache_bytes': ...})",
        )
    if given.get("use_graph_capture") and engine.hybrid_config.enable_cuda_graph is not True:
        raise _refusal(
            "use_graph_capture",
            "an engine wrapped with enable_cuda_graph=True",
            f"enable_cuda_graph={engine.hybrid_config.enable_cuda_graph!r}",
            "it out",
        )
    return bool(given.get("enable_profiling", False))


def _named(cfg: Any) -> dict[str, Any]:
    """The settings that ``cfg`` names; fields of a subclass only where they were set."""
    if cfg is None:
        return {}
    if isinstance(cfg, Mapping):
        return dict(cfg)
    named = {name: getattr(cfg, name) for name in _CFG_FIELDS if hasattr(cfg, name)}
    if dataclasses.is_dataclass(cfg):
        for field in dataclasses.fields(cfg):
            make = field.default_factory
            default = field.default if make is dataclasses.MISSING else make()
            if getattr(cfg, field.name) != default:
                named[field.name] = getattr(cfg, field.name)
    return named


def _check_count(name: str, value: object) -> None:
    if value is None and name == "continuous_batch_size":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            explain(
                f"SamplingConfig.{name} is out of range",
                expected="a whole number >= 1",
                got=repr(value),
                hint=f"Pass {name}=1 or more.",
            )
        )


def _refusal(name: str, expected: object, got: object, leave: str) -> ConfigError:
    return ConfigError(
        explain(
            f"TritonRollout can't honour cfg.{name}",
            expected=expected,
            got=got,
            hint=f"Leave {leave}.",
        )
    )
