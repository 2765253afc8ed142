"""Hugging Face's own loop over whole weights, with our sampler choosing the tokens.

It serves the models our loop can't; slower, never wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Sized
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tritonhybrid.sampler import HeadCalls, Sampler
from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import RolloutStats
from tritonhybrid_kernels.ops import Ops

_BATCH = 64


def run_hf_loop(
    model: PreTrainedModel,
    sequences: Sized[Sequence],
    ops: Ops,
    stats: RolloutStats,
    finish_text: Callable[[Sequence], None],
) -> None:
    """Sample every sequence to its end; they are filled in place.

    Args:
        model: Whole parameters, eval mode.
        sequences: Not started.
        ops: The operations to sample with.
        stats: Filled in place.
        finish_text: Ends a sequence whose text holds a stop string.
    """
    start = time.perf_counter()
    # Prompts of like length together: less padding.
    order = sorted(sequences, key=lambda s: len(s.prompt))
    for first in range(0, len(order), _BATCH):
        _run_batch(model, order[first : first + _BATCH], ops, stats, finish_text)
    stats.decode_s = time.perf_counter() - start


def _run_batch(
    model: PreTrainedModel,
    sequences: list[Sequence],
    ops: Ops,
    stats: RolloutStats,
    finish_text: Callable[[Sequence], None],
) -> None:
    device = next(model.parameters()).device
    width = max(len(s.prompt) for s in sequences)
    pads = [width - len(s.prompt) for s in sequences]
    filler = sequences[0].prompt[0]
    ids = [[filler] * pad + list(s.prompt) for pad, s in zip(pads, sequences, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in pads]
    sampling = _OurSampling(sequences, ops, device, finish_text)

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        return type(model)._sample(
            model,
            input_ids,
            logits_processor=LogitsProcessorList([sampling]),
            stopping_criteria=StoppingCriteriaList([_AllEnded(sequences)]),
            generation_config=generation_config,
            **model_kwargs,
        )

    with torch.no_grad():
        generate: Any = type(model).generate  # type: ignore[attr-defined]
        generate(
            model,
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(
                max_new_tokens=max(s.params.max_new_tokens for s in sequences),
                do_sample=False,
                pad_token_id=filler,
            ),
            custom_generate=decode,
        )
    stats.prefill_tokens += sum(len(s.prompt) for s in sequences)
    stats.num_prefill_steps += 1
    stats.num_decode_steps += max(len(s.output) for s in sequences) - 1


class _OurSampling(LogitsProcessor):
    """Samples with our noise and leaves HF's argmax only the token we drew."""

    def __init__(
        self,
        sequences: list[Sequence],
        ops: Ops,
        device: torch.device,
        finish_text: Callable[[Sequence], None],
    ) -> None:
        self._sequences = sequences
        self._finish_text = finish_text
        head = HeadCalls(logits=lambda scores: scores, weight=None, bias=None)
        self._sampler = Sampler(ops, head, device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        live = [row for row, s in enumerate(self._sequences) if not s.is_finished]
        rows = torch.tensor(live, device=scores.device)
        sequences = [self._sequences[row] for row in live]
        sampled = self._sampler.sample(scores.float(), sequences, rows)
        chosen = torch.full_like(scores, float("-inf"))
        chosen[:, 0] = 0
        for row, sequence, token, logprob, raw in zip(
            live,
            sequences,
            sampled.tokens,
            sampled.logprobs,
            sampled.raw_logprobs,
            strict=True,
        ):
            sequence.append(token, logprob, raw)
            self._finish_text(sequence)
            chosen[row, token] = 1
        return chosen


class _AllEnded(StoppingCriteria):
    """Stops when our sequences have all ended."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self._sequences = sequences

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        done = all(s.is_finished for s in self._sequences)
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)
