"""DeepSpeed's rollout interface over a wrapped engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.rollout.base import (
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    SamplingConfig,
)

from tritonhybrid.engine import HybridEngine
from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.rollout_output import Completion
from tritonhybrid.sampling_params import SamplingParams


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
        tokenizer: Gives pad and EOS ids.
        cfg: DeepSpeed's RolloutConfig; nothing of it applies here.

    Raises:
        ValueError: The tokenizer has neither a pad nor an EOS id.
    """

    name = "tritonhybrid"

    def __init__(self, engine: HybridEngine, tokenizer: Any, cfg: Any = None) -> None:
        del cfg
        self.engine = engine
        eos = tokenizer.eos_token_id
        self._eos: list[int] = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        pad = tokenizer.pad_token_id
        if pad is None and self._eos:
            pad = self._eos[0]
        if pad is None:
            raise ConfigError(
                explain(
                    "A rollout batch needs a padding token",
                    expected="a tokenizer with pad_token_id or eos_token_id",
                    got="neither",
                    hint="Set tokenizer.pad_token_id.",
                )
            )
        self._pad = int(pad)

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> TritonRolloutBatch:
        """Sample ``n_samples_per_prompt`` responses a prompt.

        With ZeRO-3 every rank must call this together.

        Args:
            request: Left-padded prompts [B, Tp] and their mask.
            sampling: temperature <= 0 is greedy, top_k <= 0 off;
                ``continuous_batch_size`` bounds nothing here: batching is continuous.

        Returns:
            Rows grouped by prompt; ``response_start_idx`` is Tp; the first EOS is kept
            and attended; what follows it is padding with mask 0.

        Raises:
            ConfigError: A prompt is empty or a value out of range.
        """
        greedy = sampling.temperature <= 0
        out = self.engine.rollout(
            request.prompt_ids,
            SamplingParams(
                max_new_tokens=sampling.max_new_tokens,
                temperature=0.0 if greedy else sampling.temperature,
                top_p=1.0 if greedy else sampling.top_p,
                top_k=0 if greedy else max(sampling.top_k, 0),
                n=sampling.n_samples_per_prompt,
                eos_token_id=self._eos,
            ),
            attention_mask=request.prompt_attention_mask,
        )
        return self._batch(request, out.completions)

    def sync_weights(self, step: int) -> None:
        """Nothing to push: the weights are the trainer's own."""

    def _batch(self, request: RolloutRequest, completions: list[Completion]) -> TritonRolloutBatch:
        prompts, mask = request.prompt_ids, request.prompt_attention_mask
        device, width = prompts.device, prompts.shape[1]
        longest = max((len(c.token_ids) for c in completions), default=0)
        shape = (len(completions), width + longest)
        ids = torch.full(shape, self._pad, dtype=prompts.dtype, device=device)
        attended = torch.zeros(shape, dtype=mask.dtype, device=device)
        logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
        raw = torch.zeros_like(logprobs)
        for row, completion in enumerate(completions):
            span = slice(width, width + len(completion.token_ids))
            ids[row, :width] = prompts[completion.prompt_index]
            attended[row, :width] = mask[completion.prompt_index]
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
