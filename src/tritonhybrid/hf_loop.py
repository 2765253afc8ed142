"""Hugging Face's own loop over whole weights, with our sampler choosing the tokens.

It serves the models our loop can't; slower, never wrong.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sized
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tritonhybrid.containers.parts import own_generate
from tritonhybrid.errors import UnsupportedModelError, explain
from tritonhybrid.sampler import HeadCalls, Sampler
from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import RolloutStats
from tritonhybrid_kernels.ops import Ops

_BATCH = 64


def run_hf_loop(
    module: nn.Module,
    sequences: Sized[Sequence],
    ops: Ops,
    stats: RolloutStats,
    finish_text: Callable[[Sequence], None],
) -> None:
    """Sample every sequence to its end; they are filled in place.

    Args:
        module: Whole parameters, eval mode; a PEFT wrapper adds what its generate adds.
        sequences: Not started.
        ops: The operations to sample with.
        stats: Filled in place.
        finish_text: Ends a sequence whose text holds a stop string.
    """
    start = time.perf_counter()
    # Only prompts of one length together: not every model computes the same beside padding
    # (sparse indexers and rope that follows the batch's length do not).
    order = sorted(sequences, key=lambda s: len(s.prompt))
    for _, group in groupby(order, key=lambda s: len(s.prompt)):
        alike = list(group)
        for first in range(0, len(alike), _BATCH):
            _run_batch(module, alike[first : first + _BATCH], ops, stats, finish_text)
    stats.decode_s = time.perf_counter() - start


def _run_batch(
    module: nn.Module,
    sequences: list[Sequence],
    ops: Ops,
    stats: RolloutStats,
    finish_text: Callable[[Sequence], None],
) -> None:
    device = next(module.parameters()).device
    ids = torch.tensor([s.prompt for s in sequences], device=device)
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

    with torch.no_grad(), refusing_lost_prefix():
        own_generate(module)(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            # Named in full: what is left out is taken from the model's generation config.
            generation_config=GenerationConfig(
                max_new_tokens=max(s.params.max_new_tokens for s in sequences),
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
                pad_token_id=0,
            ),
            custom_generate=decode,
        )
    stats.prefill_tokens += sum(len(s.prompt) for s in sequences)
    stats.num_prefill_steps += 1
    stats.num_decode_steps += max(len(s.output) for s in sequences) - 1


@contextmanager
def refusing_lost_prefix() -> Iterator[None]:
    """Raise where transformers would ignore the prefix that PEFT's prefix tuning has learnt.

    transformers 5.24 renamed the cache; PEFT up to 0.21.2 passes the prefix by the old name,
    which HF's generate then drops with a warning: the base model's tokens would come out.

    Raises:
        UnsupportedModelError: It happened.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Both `past_key_values` and `cache` are set")
        try:
            yield
        except FutureWarning as lost:
            if "Both `past_key_values` and `cache`" not in str(lost):
                raise
            raise UnsupportedModelError(
                explain(
                    "PEFT must hand its prefix to transformers by a name that it reads",
                    expected="a release of PEFT that knows `cache`, or transformers < 5.24",
                    got="a prefix that HF's generate ignores",
                    hint="Pin transformers below 5.24, or upgrade PEFT.",
                )
            ) from lost


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
        for index, (row, sequence) in enumerate(zip(live, sequences, strict=True)):
            sequence.append(*sampled.row(index))
            self._finish_text(sequence)
            chosen[row, sampled.tokens[index]] = 1
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
