"""From what a caller passes to checked sequences, in input order."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Sized
from dataclasses import dataclass
from typing import Any

import torch

from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.noise import default_uid, sequence_key, signed64
from tritonhybrid.rollout_output import Completion
from tritonhybrid.sampling_params import SamplingParams, listed
from tritonhybrid.sequence import Sequence

Prompts = Sized[Sized[int]] | Sized[torch.Tensor] | torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a prompt is checked against.

    Args:
        vocab_size: Token ids lie below it.
        max_length: Most tokens of prompt plus response, or None.
        max_length_name: Where that limit comes from.
        eos_token_ids: generation_config's ends.
        rank: Data-parallel rank, part of the default uid.
        has_tokenizer: Whether stop strings can be served.
    """

    vocab_size: int
    max_length: int | None
    max_length_name: str
    eos_token_ids: tuple[int, ...]
    rank: int
    has_tokenizer: bool


def build_sequences(
    prompts: Prompts,
    sampling: SamplingParams | Sized[SamplingParams],
    limits: Limits,
    *,
    seed: int,
    uids: Sized[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    policy_version: int = 0,
) -> list[Sequence]:
    """Check everything on the host, before any device or other rank is involved.

    Args:
        prompts: Token ids, ragged; or a [B, T] tensor, padded where
            ``attention_mask`` is 0.
        sampling: For all prompts, or one each.
        limits: What to check against.
        seed: For prompts whose parameters name none.
        uids: Identity of each prompt's noise; None takes (rank, index).
        attention_mask: [B, T], 1 on real tokens; only with a tensor.
        policy_version: Of the weights that will sample.

    Returns:
        n sequences a prompt, adjacent, in input order.

    Raises:
        ConfigError: Something is empty, out of range or of the wrong length.
    """
    ragged = _ragged(prompts, attention_mask)
    params = _one_each(sampling, len(ragged))
    if uids is not None:
        _check_uids(uids, len(ragged))
    prompt_keys: dict[tuple[int, ...], int] = {}
    sequences = []
    for index, (prompt, own) in enumerate(zip(ragged, params, strict=True)):
        _check_prompt(index, prompt, own, limits)
        ends = _ends(own, limits)
        key = prompt_keys.setdefault(prompt, len(prompt_keys))
        uid = signed64(uids[index]) if uids is not None else default_uid(limits.rank, index)
        own_seed = own.seed if own.seed is not None else seed
        for sample in range(own.n):
            sequences.append(
                Sequence(
                    prompt_index=index,
                    sample_index=sample,
                    uid=uid,
                    key=sequence_key(own_seed, sample),
                    prompt=prompt,
                    prompt_key=key,
                    params=own,
                    end_ids=ends,
                    policy_version=policy_version,
                )
            )
    return sequences


def completions(sequences: Iterable[Sequence], tokenizer: Any) -> list[Completion]:
    """What the caller gets of sequences, decoded where a tokenizer is at hand."""
    results = []
    for sequence in sequences:
        text = sequence.text
        if text is None and tokenizer is not None:
            skips = sequence.params.skip_special_tokens
            text = tokenizer.decode(sequence.output, skip_special_tokens=skips)
        results.append(
            Completion(
                prompt_index=sequence.prompt_index,
                sample_index=sequence.sample_index,
                token_ids=list(sequence.output),
                logprobs=list(sequence.logprobs),
                raw_logprobs=list(sequence.raw_logprobs),
                finish_reason=sequence.finish_reason or "budget",
                text=text,
                top_logprobs=list(sequence.top_logprobs),
                entropies=list(sequence.entropies),
                policy_versions=list(sequence.policy_versions),
            )
        )
    return results


def _ragged(prompts: Any, attention_mask: torch.Tensor | None) -> list[tuple[int, ...]]:
    if isinstance(prompts, torch.Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise _refusal(
                "A tensor of prompts is [B, T] of token ids",
                "2 dimensions of integers",
                f"{tuple(prompts.shape)} of {prompts.dtype}",
                "Pass a 2-D integer tensor or a list of lists.",
            )
        if attention_mask is None:
            return [tuple(row) for row in prompts.tolist()]
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != prompts.shape:
            raise _refusal(
                "attention_mask belongs to the prompts",
                tuple(prompts.shape),
                tuple(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__,
                "Pass a mask of the prompts' shape.",
            )
        real = attention_mask.ne(0).int()
        starts = real.diff(dim=1, prepend=real.new_zeros(real.shape[0], 1)) == 1
        if bool((starts.sum(1) > 1).any()):
            raise _refusal(
                "attention_mask pads the ends of a prompt, not its middle",
                "ones in one run a row",
                "a row with a hole",
                "Take the tokens out of the prompt, or pass lists of token ids.",
            )
        return [
            tuple(token for token, real in zip(row, mask, strict=True) if real)
            for row, mask in zip(prompts.tolist(), attention_mask.tolist(), strict=True)
        ]
    if attention_mask is not None:
        raise _refusal(
            "attention_mask goes with a tensor of prompts",
            "a [B, T] tensor",
            type(prompts).__name__,
            "Drop the mask: a list of lists has no padding.",
        )
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise _not_a_list(prompts)
    return [_one_prompt(prompt) for prompt in prompts]


def _one_prompt(prompt: Any) -> tuple[Any, ...]:
    # Tensors and numpy arrays give Python integers.
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise _not_a_list(tokens)
    return tuple(tokens)


def _not_a_list(found: object) -> ConfigError:
    got = "text" if isinstance(found, str | bytes) else type(found).__name__
    return _refusal(
        "Prompts are a list of prompts",
        "a list of lists of token ids",
        f"{got} in place of a list",
        "Tokenise text first, and pass one list of token ids a prompt.",
    )


def _one_each(sampling: SamplingParams | Sized[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if (
        isinstance(sampling, Sized)
        and len(sampling) == count
        and all(isinstance(params, SamplingParams) for params in sampling)
    ):
        return list(sampling)
    got = f"{len(sampling)} of them" if isinstance(sampling, Sized) else type(sampling).__name__
    raise _refusal(
        "sampling is one SamplingParams, or one a prompt",
        f"a SamplingParams or a list of {count}",
        got,
        "Pass as many as there are prompts.",
    )


def _check_uids(uids: Sized[int], count: int) -> None:
    if (
        not isinstance(uids, Sized)
        or len(uids) != count
        or any(isinstance(u, bool) or not isinstance(u, int) for u in uids)
    ):
        raise _refusal(
            "uids are one whole number a prompt",
            f"{count} integers",
            f"{len(uids)} values" if isinstance(uids, Sized) else type(uids).__name__,
            "Pass one uid for each prompt.",
        )
    outside = [uid for uid in uids if not -(2**63) <= uid < 2**63]
    if outside:
        raise _refusal(
            "uids are 64-bit integers",
            "-2**63 to 2**63 - 1",
            outside[0],
            "Number the prompts, or hash their names to 63 bits.",
        )
    if len(set(uids)) != len(uids):
        raise _refusal(
            "uids are distinct, or two prompts would share their noise",
            "distinct integers",
            "a uid that stands twice",
            "Number the prompts.",
        )


def _check_prompt(
    index: int, prompt: tuple[int, ...], params: SamplingParams, limits: Limits
) -> None:
    if not prompt:
        raise _refusal(
            f"Prompt {index} is empty", "at least one token", "none", "Start it with BOS."
        )
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int):
            raise _refusal(
                f"Prompt {index} holds a value that is no token id",
                "whole numbers",
                type(token).__name__,
                "Pass token ids.",
            )
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        bad = min(prompt) if min(prompt) < 0 else max(prompt)
        raise _refusal(
            f"Prompt {index} holds a token id outside the vocabulary",
            f"0 to {limits.vocab_size - 1}",
            bad,
            "Check that tokenizer and model belong together.",
        )
    total = len(prompt) + params.max_new_tokens
    if limits.max_length is not None and total > limits.max_length:
        raise _refusal(
            f"Prompt {index} plus max_new_tokens exceeds {limits.max_length_name}",
            f"at most {limits.max_length} tokens",
            f"{len(prompt)} + {params.max_new_tokens} = {total}",
            "Shorten the prompt or lower max_new_tokens.",
        )
    if params.stop and not limits.has_tokenizer:
        raise _refusal(
            "SamplingParams.stop needs a tokenizer",
            "wrap(engine, tokenizer=...)",
            "no tokenizer",
            "Pass the tokenizer to wrap, or use stop_token_ids.",
        )
    _check_token_settings(params, limits)


def _check_token_settings(params: SamplingParams, limits: Limits) -> None:
    bos = params.forced_bos_token_id
    for name, ids in (
        ("logit_bias", list(params.logit_bias or ())),
        ("bad_words_ids", [token for word in params.bad_words_ids for token in word]),
        ("suppress_tokens", params.suppress_tokens),
        ("begin_suppress_tokens", params.begin_suppress_tokens),
        ("forced_bos_token_id", () if bos is None else (bos,)),
        ("forced_eos_token_id", listed(params.forced_eos_token_id)),
    ):
        bad = sorted(token for token in ids if not 0 <= token < limits.vocab_size)
        if bad:
            raise _refusal(
                f"SamplingParams.{name} holds token ids outside the vocabulary",
                f"0 to {limits.vocab_size - 1}",
                bad,
                "Check that tokenizer and model belong together.",
            )
    if params.top_logprobs > limits.vocab_size:
        raise _refusal(
            "SamplingParams.top_logprobs can't exceed the vocabulary",
            f"<= {limits.vocab_size}",
            params.top_logprobs,
            "Lower top_logprobs.",
        )


def _ends(params: SamplingParams, limits: Limits) -> frozenset[int]:
    ends: set[int] = set(params.stop_token_ids)
    if not params.ignore_eos:
        eos = params.eos_token_id
        ends |= set(limits.eos_token_ids if eos is None else listed(eos))
    bad = sorted(token for token in ends if not 0 <= token < limits.vocab_size)
    if bad:
        raise _refusal(
            "An end token lies outside the vocabulary",
            f"0 to {limits.vocab_size - 1}",
            bad,
            "Correct eos_token_id or stop_token_ids.",
        )
    return frozenset(ends)


def _refusal(rule: str, expected: object, got: object, hint: str) -> ConfigError:
    return ConfigError(explain(rule, expected=expected, got=got, hint=hint))
