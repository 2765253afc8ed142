"""Proof that a model family is served right: tokens and log-probabilities held against HF's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tritonhybrid.config import HybridConfig, resolve
from tritonhybrid.containers.parts import causal_model, find_parts
from tritonhybrid.engine import HybridEngine
from tritonhybrid.engine_state import EngineState
from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.generation import Generation
from tritonhybrid.rollout_output import Completion
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.weights.source import WeightSource

# With the default pages of 16 tokens: inside a page, filling one, one past it, several.
_LENGTHS = (5, 1, 16, 41, 17)
_BLOCK_SIZE = 16
_LOGPROB_TOLERANCE = 2e-4


@dataclass(frozen=True, kw_only=True)
class FamilyReport:
    """What :func:`check_family` found.

    Args:
        family: Class name of the model.
        dtype: Of its weights.
        path: "fused", "generic" or "hf".
        layer_paths: Layers per path and reason.
        notes: Announced decisions, in words.
        num_tokens: Greedy tokens compared with HF's.
        num_equal: How many are the same; all of them in fp32.
        max_logprob_error: Largest distance of a log-probability, greedy or sampled,
            from an fp64 log-softmax of HF's forward in the same dtype.
    """

    family: str
    dtype: str
    path: str
    layer_paths: Mapping[str, int]
    notes: tuple[str, ...]
    num_tokens: int
    num_equal: int
    max_logprob_error: float


def check_family(
    model: PreTrainedModel | Callable[[], PreTrainedModel] | HybridEngine,
    *,
    dtype: torch.dtype | None = None,
    prompts: Sized[Sized[int]] | None = None,
    max_new_tokens: int = 24,
    path: str | None = None,
    config: HybridConfig | Mapping[str, Any] | None = None,
) -> FamilyReport:
    """Prove that rollouts and generate of a model say what Hugging Face's says.

    Greedy tokens of ``rollout`` are compared with HF's ``generate`` of each prompt
    alone, those of ``generate`` with HF's on the left-padded batch, log-probabilities
    of greedy and of sampled tokens (two a prompt, so that pages are shared and copied)
    with an fp64 log-softmax of HF's forward. In fp32 every token must be the same and
    every log-probability within 2e-4. In bf16 and fp16, where rounding decides
    between near ties, the root mean square error against the model in fp32 may be
    twice that of HF's own forward.

    With a ZeRO-3 engine every rank must call this together.

    Args:
        model: A Hugging Face model, a function that makes one, or a wrapped engine.
            A model needs no DeepSpeed; it is left in eval mode.
        dtype: Converts the model first; None takes it as it is.
        prompts: Token ids; None takes random ones of mixed lengths. Give some longer
            than the model's attention window, if it has one.
        max_new_tokens: Greedy tokens a prompt.
        path: "fused", "generic" or "hf" if that is to be proved as well.
        config: Settings for a model; None takes pages of 16 tokens. An engine has its own.

    Returns:
        The report.

    Raises:
        AssertionError: Something differs; the message says what.
        ConfigError: ``dtype`` or ``config`` is given with an engine.
        UnsupportedModelError: The model can't generate.
    """
    engine = _engine(model, dtype, config)
    subject = _Subject(engine)
    given = prompts if prompts is not None else subject.random_prompts(max_new_tokens)
    histories = [list(prompt) for prompt in given]
    greedy = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    sampled = SamplingParams(max_new_tokens=max_new_tokens, n=2, seed=0)
    ours = engine.rollout(histories, greedy)
    random = engine.rollout(histories, sampled).completions
    generated = subject.generate(histories, max_new_tokens, engine.generate)
    theirs, theirs_padded = subject.reference(histories, max_new_tokens)
    served = ours.stats
    family = type(subject.model).__name__
    if path is not None and served.path != path:
        raise AssertionError(
            f"{family} was served on the {served.path} path, not {path}: "
            f"{dict(served.layer_paths)}, {served.notes}"
        )
    tokens = [completion.token_ids for completion in ours.completions]
    if subject.dtype == torch.float32:
        _require_equal(f"{family}: rollout", tokens, theirs)
        _require_equal(f"{family}: generate", generated, theirs_padded)
    error = subject.check_logprobs(family, histories, [*ours.completions, *random])
    return FamilyReport(
        family=family,
        dtype=str(subject.dtype).removeprefix("torch."),
        path=served.path,
        layer_paths=dict(served.layer_paths),
        notes=tuple(served.notes),
        num_tokens=sum(map(len, theirs)),
        num_equal=sum(
            a == b
            for mine, other in zip(tokens, theirs, strict=True)
            for a, b in zip(mine, other, strict=False)
        ),
        max_logprob_error=error,
    )


def hold(
    model: nn.Module,
    *,
    config: HybridConfig | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> HybridEngine:
    """Give a model that nobody trains a wrapped engine's rollout and generate.

    There is no DeepSpeed engine behind it: only ``rollout``, ``generate``, ``stats``
    and ``hybrid_config`` are there. The model's own ``generate`` stays Hugging Face's.

    Args:
        model: A Hugging Face causal language model; its weights are not copied.
        config: Settings; None takes pages of 16 tokens.
        tokenizer: For stop strings and decoded text.

    Raises:
        ConfigError: A setting is refused.
        UnsupportedModelError: The model can't generate.
    """
    causal_model(model)
    settings = config if config is not None else {"block_size": _BLOCK_SIZE}
    return _Held(model, resolve(settings, {}), tokenizer)


class _Held(HybridEngine):
    """A model that nobody trains, behind a wrapped engine's own rollout and generate."""

    def __init__(self, model: nn.Module, config: HybridConfig, tokenizer: Any) -> None:
        self.module = model
        source = WeightSource(self, layers_per_bucket=1, timeout_s=config.sync_timeout_s)
        self.__dict__["_tritonhybrid"] = EngineState(
            original_class=type(self),
            config=config,
            generation=Generation(model, source, config, tokenizer),
            seeds=0,
            had_generate=None,
        )

    def zero_optimization_stage(self) -> int:
        """Whole parameters, as in stage 0."""
        return 0


class _Subject:
    """The model under test and Hugging Face's own results of it.

    Args:
        engine: Holds the model.
    """

    def __init__(self, engine: HybridEngine) -> None:
        self.outer: Any = engine.module
        self.model = causal_model(self.outer)
        self.source: WeightSource = engine.__dict__["_tritonhybrid"].generation.source
        self.dtype = self.model.dtype
        self.device = next(self.model.parameters()).device

    def random_prompts(self, max_new_tokens: int) -> list[list[int]]:
        """Prompts of the mixed lengths that fit the model."""
        config: Any = self.model.config.get_text_config(decoder=True)
        room = getattr(config, "max_position_embeddings", None) or 2**31
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randint(3, int(config.vocab_size), (length,), generator=generator).tolist()
            for length in _LENGTHS
            if length + max_new_tokens <= room
        ]

    def generate(
        self, prompts: Sized[Sized[int]], max_new_tokens: int, generate: Callable[..., Any]
    ) -> list[list[int]]:
        """New tokens of a left-padded batch, through ours or HF's generate."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        # Named in full: what is left out is taken from the model's generation config.
        out = generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
        return [self._until_end(row) for row in out[:, width:].tolist()]

    def reference(
        self, prompts: Sized[Sized[int]], max_new_tokens: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """HF's greedy tokens, of each prompt alone and of the padded batch."""

        def hf(**kwargs: Any) -> Any:
            return type(self.outer).generate(self.outer, **kwargs)

        with self._whole():
            alone = [self.generate([prompt], max_new_tokens, hf)[0] for prompt in prompts]
            return alone, self.generate(prompts, max_new_tokens, hf)

    def check_logprobs(
        self, family: str, prompts: Sized[Sized[int]], completions: Sized[Completion]
    ) -> float:
        """Hold every log-probability against HF's forward; return the largest distance.

        Raises:
            AssertionError: One is too far off.
        """
        with self._whole():
            exact = [self._logprobs(self.outer, prompts, c) for c in completions]
            wide = None
            if self.dtype != torch.float32:
                wide = [self._logprobs(self._forward_in_fp32, prompts, c) for c in completions]
        ours = torch.tensor([x for c in completions for x in c.logprobs], dtype=torch.float64)
        same = torch.cat(exact)
        worst = float((ours - same).abs().max())
        if wide is None:
            if not worst <= _LOGPROB_TOLERANCE:
                raise AssertionError(f"{family}: a log-probability is off by {worst:.1e}")
            return worst
        truth = torch.cat(wide)
        own, hf = ((x - truth).square().mean().sqrt() for x in (ours, same))
        if not own <= 2 * hf:
            raise AssertionError(
                f"{family}: log-probabilities in {self.dtype} are off by {own:.1e} (RMS), "
                f"over twice HF's own {hf:.1e}"
            )
        return worst

    def _forward_in_fp32(self, **kwargs: Any) -> Any:
        tensors = {**dict(self.outer.named_parameters()), **dict(self.outer.named_buffers())}
        wide = {
            name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()
        }
        return torch.func.functional_call(self.outer, wide, kwargs=kwargs)

    def _logprobs(
        self, forward: Callable[..., Any], prompts: Sized[Sized[int]], completion: Completion
    ) -> torch.Tensor:
        """fp64 log-probabilities of a completion's tokens under HF's forward: [L]."""
        prompt = list(prompts[completion.prompt_index])
        ids = torch.tensor([prompt + completion.token_ids], device=self.device)
        logits: torch.Tensor = forward(input_ids=ids, use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        table = logits.double().log_softmax(-1)
        return table.gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()

    def _whole(self) -> Any:
        parts = find_parts(self.outer)
        return self.source.materialised(parts.layers if parts else ())

    def _until_end(self, tokens: list[int]) -> list[int]:
        eos: Any = self.model.generation_config.eos_token_id
        ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        for index, token in enumerate(tokens):
            if token in ends:
                return tokens[: index + 1]
        return tokens


def _engine(
    model: PreTrainedModel | Callable[[], PreTrainedModel] | HybridEngine,
    dtype: torch.dtype | None,
    config: HybridConfig | Mapping[str, Any] | None,
) -> HybridEngine:
    if isinstance(model, HybridEngine):
        if dtype is not None or config is not None:
            raise ConfigError(
                explain(
                    "A wrapped engine has its dtype and its settings",
                    expected="check_family(engine) alone",
                    got="dtype or config",
                    hint="Drop them, or pass the plain model.",
                )
            )
        return model
    made: Any = model if isinstance(model, nn.Module) else model()
    if dtype is not None:
        made = made.to(dtype)
    return hold(made.eval(), config=config)


def _require_equal(what: str, ours: list[list[int]], theirs: list[list[int]]) -> None:
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), -1)
            raise AssertionError(
                f"{what} differs from HF's greedy tokens of prompt {index} at token {at}: "
                f"{mine} is not {other}"
            )
