"""Settings of a wrapped engine: DeepSpeed's ``hybrid_engine`` keys and ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tritonhybrid.errors import ConfigError, explain

Backend = Literal["auto", "triton", "torch"]
SchedulingPolicy = Literal["fcfs", "longest_first"]


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Everything that can be set when an engine is wrapped.

    The first six fields are DeepSpeed's own ``hybrid_engine`` keys with its
    defaults; :func:`resolve` reads them from the engine's config.

    Args:
        inference_tp_size: Ranks that share one copy of the weights while generating.
        release_inference_cache: Give the key-value cache (and the ZeRO-3 arena)
            back at the end of each call and on ``train()``.
        pin_parameters: ZeRO-3: gather once per rollout into an arena.
        tp_gather_partition_size: ZeRO-3: decoder layers gathered at a time.
        enable_cuda_graph: Replay decode steps as CUDA graphs; true needs a CUDA device,
            "auto" is off until a GPU has run them.
        max_out_tokens: Most tokens of prompt plus response; None leaves it to the
            model's own limit and the cache.
        decode_steps_per_replay: Tokens to sample for a sequence between two looks at the
            host; those past an end are cut. "auto" is 4 with CUDA graphs, else 1.
        kv_cache_bytes: Size of the key-value cache in bytes; "auto" takes what the
            call can use, at most ``kv_cache_share`` of the memory that is free.
        kv_cache_share: Part of the free memory that the cache may take, in (0, 1].
        block_size: Tokens a cache page holds; "auto" is 64.
        max_num_seqs: Most sequences in flight.
        max_num_batched_tokens: Most prompt tokens in one prefill step (a longer
            prompt runs alone, or in chunks).
        enable_chunked_prefill: Compute prompts longer than that in chunks.
        enable_mixed_steps: Let a step take prompts and running sequences together; for
            rollouts, which wait for no first token, alternating is faster.
        enable_prefix_caching: Let sequences that begin with the same tokens share full
            pages, in a call and from call to call while the weights stay what they are. In 16
            bits what is read from shared pages may be rounded otherwise than what is computed
            anew, as with another batch.
        scheduling_policy: "fcfs" (input order) or "longest_first" (what may grow longest
            goes first, so that it does not run on alone at the end).
        consistent: Bit-equal log-probabilities in rollout and training.
        backend: "triton", "torch" or "auto" (triton on CUDA, torch elsewhere).
        torch_ops: Operations that take their torch path even on the Triton backend.
        sync_timeout_s: Seconds that a rank waits for the others of a collective call, in
            DeepSpeed's gathers too while it lasts.

    Raises:
        ConfigError: A value is out of range, or names a feature not built yet.
    """

    inference_tp_size: int = 1
    release_inference_cache: bool = False
    pin_parameters: bool = True
    tp_gather_partition_size: int = 8
    enable_cuda_graph: bool | Literal["auto"] = "auto"
    max_out_tokens: int | None = None
    decode_steps_per_replay: int | Literal["auto"] = "auto"
    kv_cache_bytes: int | Literal["auto"] = "auto"
    kv_cache_share: float = 0.5
    block_size: int | Literal["auto"] = "auto"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_chunked_prefill: bool = False
    enable_mixed_steps: bool = False
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    consistent: bool | Literal["auto"] = False
    backend: Backend = "auto"
    torch_ops: tuple[str, ...] = ()
    sync_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        """Refuse what is out of range and what is not built yet."""
        for name in (
            "inference_tp_size",
            "tp_gather_partition_size",
            "max_num_seqs",
            "max_num_batched_tokens",
        ):
            _positive(name, getattr(self, name))
        if self.max_out_tokens is not None:
            _positive("max_out_tokens", self.max_out_tokens)
        if self.decode_steps_per_replay != "auto":
            _positive("decode_steps_per_replay", self.decode_steps_per_replay)
        if self.kv_cache_bytes != "auto":
            _positive("kv_cache_bytes", self.kv_cache_bytes)
        if self.block_size != "auto":
            _positive("block_size", self.block_size)
        if self.backend not in ("auto", "triton", "torch"):
            raise _refusal("backend", "'auto', 'triton' or 'torch'", self.backend, "Pick one.")
        if not isinstance(self.sync_timeout_s, int | float) or not (0 < self.sync_timeout_s < 1e8):
            raise _refusal(
                "sync_timeout_s", "seconds > 0, less than 1e8", self.sync_timeout_s, "Raise it."
            )
        if not isinstance(self.torch_ops, list | tuple | set | frozenset):
            raise _refusal(
                "torch_ops", "a list of operations", self.torch_ops, "Pass a list of names."
            )
        for name in ("enable_cuda_graph", "consistent"):
            if getattr(self, name) not in (True, False, "auto"):
                raise _refusal(name, "true, false or 'auto'", getattr(self, name), "Pick one.")
        if self.scheduling_policy not in ("fcfs", "longest_first"):
            raise _refusal(
                "scheduling_policy",
                "'fcfs' or 'longest_first'",
                self.scheduling_policy,
                "Pick one.",
            )
        share = self.kv_cache_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise _refusal("kv_cache_share", "a number in (0, 1]", share, "Pass a fraction.")
        for name in (
            "release_inference_cache",
            "pin_parameters",
            "enable_chunked_prefill",
            "enable_mixed_steps",
            "enable_prefix_caching",
        ):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, "true or false", getattr(self, name), "Pass a bool.")
        self._refuse_missing_features()

    def _refuse_missing_features(self) -> None:
        if self.inference_tp_size != 1:
            raise _missing("inference_tp_size > 1", "Set inference_tp_size to 1.")
        if self.consistent is True:
            raise _missing("consistent", 'Set it to "auto" or false.')
        if not self.pin_parameters:
            raise _missing("pin_parameters=false (layer by layer gathering)", "Leave it true.")


def resolve(
    given: HybridConfig | Mapping[str, Any] | None, deepspeed_keys: Mapping[str, Any]
) -> HybridConfig:
    """Merge what ``wrap`` was given over the ``hybrid_engine`` block of the engine's JSON.

    Args:
        given: ``wrap``'s config argument; of a HybridConfig the fields that differ from
            their defaults.
        deepspeed_keys: The user's own ``hybrid_engine`` keys; ``enabled`` is
            ignored because ``wrap`` is the switch, and DeepSpeed's
            ``enable_cuda_graph: false`` default never reaches here unless named.

    Returns:
        The frozen settings.

    Raises:
        ConfigError: A key is unknown or a value is refused.
    """
    if isinstance(given, HybridConfig):
        given = {
            field.name: value
            for field in dataclasses.fields(given)
            if (value := getattr(given, field.name)) != field.default
        }
    if given is not None and not isinstance(given, Mapping):
        raise _refusal(
            "config", "a HybridConfig, a dict or None", type(given).__name__, "Pass a dict."
        )
    named = {key: value for key, value in deepspeed_keys.items() if key != "enabled"}
    named.update(given or {})
    known = {field.name for field in dataclasses.fields(HybridConfig)}
    unknown = sorted(set(named) - known)
    if unknown:
        raise _refusal(
            "a HybridConfig key is unknown",
            f"one of {sorted(known)}",
            unknown,
            "Correct the spelling or remove the key.",
            verbatim=True,
        )
    return HybridConfig(**named)


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(name, "a whole number >= 1", value, "Set it to 1 or more.")


def _refusal(
    name: str, expected: object, got: object, hint: str, *, verbatim: bool = False
) -> ConfigError:
    rule = name if verbatim else f"HybridConfig.{name} is out of range"
    return ConfigError(explain(rule, expected=expected, got=repr(got), hint=hint))


def _missing(name: str, hint: str) -> ConfigError:
    return ConfigError(
        explain(
            f"HybridConfig: {name} is not available in this version",
            expected="a feature that exists",
            got=name,
            hint=hint,
        )
    )
