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

from tritonhybrid.call import Call
from tritonhybrid.call_observer import StepReport
from tritonhybrid.containers.parts import own_generate
from tritonhybrid.errors import UnsupportedModelError, explain
from tritonhybrid.sampler import HeadCalls, Sampler
from tritonhybrid.sequence import Sequence
from tritonhybrid_kernels.ops import Ops

_BATCH = 64


def run_hf_loop(
    module: nn.Module,
    sequences: Sized[Sequence],
    ops: Ops,
    call: Call,
    finish_text: Callable[[Sequence], None],
) -> None:
    """Sample every sequence to its end, or to the end of the budget; they are filled in place.

    Args:
        module: Whole parameters, eval mode; a PEFT wrapper adds what its generate adds.
        sequences: What they hold already is part of the prompt.
        ops: The operations to sample with.
        call: Its stats are filled.
        finish_text: Ends a sequence whose text holds a stop string.
    """
    start = time.perf_counter()
    # Only prompts of one length together: not every model computes the same beside padding
    # (sparse indexers and rope that follows the batch's length do not).
    order = sorted(sequences, key=len)
    for _, group in groupby(order, key=len):
        alike = list(group)
        for first in range(0, len(alike), _BATCH):
            if not call.is_spent:
                _run_batch(module, alike[first : first + _BATCH], ops, call, finish_text)
    call.stats.decode_s = time.perf_counter() - start


def _run_batch(
    module: nn.Module,
    sequences: list[Sequence],
    ops: Ops,
    call: Call,
    finish_text: Callable[[Sequence], None],
) -> None:
    device = next(module.parameters()).device
    ids = torch.tensor([s.tokens for s in sequences], device=device)
    before = [len(s.output) for s in sequences]
    sampling = _OurSampling(sequences, ops, device, call, finish_text)

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
            stopping_criteria=StoppingCriteriaList([_AllEnded(sequences, call)]),
            generation_config=generation_config,
            **model_kwargs,
        )

    with torch.no_grad(), refusing_lost_prefix():
        own_generate(module)(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            # Named in full: what is left out is taken from the model's generation config.
            generation_config=GenerationConfig(
                max_new_tokens=max(s.max_length - len(s) for s in sequences),
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
                pad_token_id=0,
            ),
            custom_generate=decode,
        )
    new = [len(s.output) - count for s, count in zip(sequences, before, strict=True)]
    call.stats.prefill_tokens += ids.numel()
    call.stats.num_prefill_steps += 1
    call.stats.num_decode_steps += max(new) - 1
    call.stats.decode_tokens += sum(new) - len(new)


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
        call: Call,
        finish_text: Callable[[Sequence], None],
    ) -> None:
        self._sequences = sequences
        self._call = call
        self._finish_text = finish_text
        self._step_start = time.perf_counter()
        self._is_first = True
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
        self._call.num_sampled += len(live)
        if self._call.observers:
            self._tell(input_ids, sequences)
        return chosen

    def _tell(self, input_ids: torch.Tensor, sequences: list[Sequence]) -> None:
        """Tell who watches the call of a step: HF's forward and our sampling."""
        now, num_tokens = time.perf_counter(), len(sequences)
        report = StepReport(
            start_s=self._step_start,
            seconds=now - self._step_start,
            num_prompts=num_tokens if self._is_first else 0,
            num_decoding=0 if self._is_first else num_tokens,
            prefill_tokens=input_ids.numel() if self._is_first else 0,
            decode_tokens=0 if self._is_first else num_tokens,
            kept_tokens=num_tokens,
        )
        self._step_start, self._is_first = now, False
        for observer in self._call.observers:
            observer.on_step(report)
        self._call.tell_finished([s for s in sequences if s.is_finished])


class _AllEnded(StoppingCriteria):
    """Stops when our sequences have all ended, or the call's budget is spent."""

    def __init__(self, sequences: list[Sequence], call: Call) -> None:
        self._sequences = sequences
        self._call = call

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        done = self._call.is_spent or all(s.is_finished for s in self._sequences)
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)
