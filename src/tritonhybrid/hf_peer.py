"""Hugging Face's own generate as the yardstick: same weights, same prompts, same tokens wanted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.sampling_params import SamplingParams


@dataclass(kw_only=True)
class Speed:
    """Tokens returned and the seconds they took, summed over calls.

    Args:
        num_tokens: Completion tokens, the ending EOS included, padding not.
        seconds: Wall time of the calls.
    """

    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens a second over all calls."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    def add(self, completions: Sequence[Sequence[int]], seconds: float) -> None:
        """Count one call."""
        self.num_tokens += sum(map(len, completions))
        self.seconds += seconds


class HfPeer:
    """A plain module outside DeepSpeed that answers prompts with ``module.generate``.

    Args:
        model: The module; this object puts it in eval mode and owns it from here on.
        pad_token_id: Fills the left of shorter prompts; masked, so any id will do.
    """

    def __init__(self, model: Any, *, pad_token_id: int = 0) -> None:
        self.model = model.eval()
        self.pad_token_id = pad_token_id

    def load_weights(self, engine: Any) -> None:
        """Copy a wrapped engine's weights; in ZeRO-3 every rank must call this.

        Args:
            engine: The wrapped engine; its module has this peer's architecture.
        """
        # Here, because it imports deepspeed, which has to be told the device first.
        from tritonhybrid.weights.source import WeightSource

        source = WeightSource(engine, layers_per_bucket=8, timeout_s=1800.0)
        with source.materialised():
            self.model.load_state_dict(engine.module.state_dict())

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> list[list[int]]:
        """Generate for a left-padded batch of all prompts at once.

        Args:
            prompts: Token ids, lengths may differ.
            sampling: max_new_tokens, temperature, top_p, top_k, n and the ends are honoured.

        Returns:
            n completions a prompt, adjacent, each cut after its first end token.

        Raises:
            ConfigError: ``sampling`` sets what this comparison does not translate.
        """
        untranslated = {
            "min_p": sampling.min_p,
            "min_new_tokens": sampling.min_new_tokens,
            "stop": sampling.stop,
            "seed": sampling.seed,
            "repetition_penalty": sampling.repetition_penalty - 1.0,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": sampling.logit_bias,
            "bad_words_ids": sampling.bad_words_ids,
            "suppress_tokens": sampling.suppress_tokens,
            "begin_suppress_tokens": sampling.begin_suppress_tokens,
            "forced_bos_token_id": sampling.forced_bos_token_id is not None,
            "forced_eos_token_id": sampling.forced_eos_token_id is not None,
        }
        if named := [name for name, value in untranslated.items() if value]:
            raise ConfigError(
                explain(
                    "The comparison with HF's generate takes plain sampling",
                    expected="temperature, top_p, top_k, n and end tokens",
                    got=", ".join(named),
                    hint="Leave these out where the two are compared.",
                )
            )
        ends = self._ends(sampling)
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        # Named in full: what is left out is taken from the model's own generation config.
        with torch.no_grad():
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=not sampling.is_greedy,
                num_return_sequences=sampling.n,
                temperature=1.0 if sampling.is_greedy else sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                repetition_penalty=1.0,
                eos_token_id=ends or None,
                pad_token_id=self.pad_token_id,
            )
        return [cut_after_end(row, ends) for row in output[:, width:].tolist()]

    def timed(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, speed: Speed
    ) -> list[list[int]]:
        """Call :meth:`generate` and add its tokens and wall time to ``speed``."""
        begin = time.perf_counter()
        completions = self.generate(prompts, sampling)
        speed.add(completions, time.perf_counter() - begin)
        return completions

    def _ends(self, sampling: SamplingParams) -> list[int]:
        named = sampling.eos_token_id
        if sampling.ignore_eos:
            named = ()
        elif named is None:
            named = self.model.generation_config.eos_token_id
        ends = [] if named is None else [named] if isinstance(named, int) else list(named)
        return [*ends, *sampling.stop_token_ids]


def cut_after_end(token_ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Keep the tokens up to the first end token, which stays."""
    for index, token in enumerate(token_ids):
        if token in ends:
            return list(token_ids[: index + 1])
    return list(token_ids)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How many token positions two lists of completions share.

    Args:
        num_equal: Positions with the same token in both.
        num_tokens: Positions compared; one that only one of a pair has counts as unequal.
    """

    num_equal: int
    num_tokens: int

    @classmethod
    def between(cls, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> Agreement:
        """Compare completion by completion, position by position."""
        num_equal = num_tokens = 0
        for left, right in zip(ours, theirs, strict=True):
            num_tokens += max(len(left), len(right))
            num_equal += sum(a == b for a, b in zip(left, right, strict=False))
        return cls(num_equal=num_equal, num_tokens=num_tokens)

    @property
    def is_whole(self) -> bool:
        """Whether there was something to compare and all of it was equal."""
        return self.num_tokens > 0 and self.num_equal == self.num_tokens

    def __str__(self) -> str:
        # Rounded down: 100 % stands for all, never for nearly all.
        tenths = 1000 * self.num_equal // max(self.num_tokens, 1)
        return f"{tenths // 10}.{tenths % 10} % ({self.num_equal:,} of {self.num_tokens:,} tokens)"
