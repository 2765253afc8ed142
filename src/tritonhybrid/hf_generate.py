"""``generate`` with Hugging Face's own contract over our loop.

HF's ``generate`` does what it always does (argument checks, GenerationConfig,
special tokens, expansion to num_return_sequences) and hands the decoding to us
through its ``custom_generate`` door. What our loop doesn't serve goes back to HF's
decoding, over whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.sampling_params import SamplingParams

# What the generation config alone says again, in words our sampler knows.
_SERVED_PROCESSORS = (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)
_SERVED_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
# transformers 5.24 calls past_key_values cache.
_CACHES = ("cache", "past_key_values")
# A tokenizer serves stop strings; HF hands it to its own decodings only.
# A cache that the caller hands over is to be filled, or read: ours has another shape.
# PEFT hooks its adapters, row by row of the padded batch: our rows are packed.
_OWN_DECODING = (
    *_CACHES,
    "adapter_names",
    "alora_offsets",
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "logits_processor",
    "num_beams",
    "stopping_criteria",
    "tokenizer",
)
# All but self and the keyword arguments.
_PARAMETERS = tuple(signature(GenerationMixin.generate).parameters)[1:-1]
# The ids and the generation config.
_NUM_POSITIONAL = 2
_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    *_CACHES,
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "cache_implementation",
}

OnToken = Callable[[int], None]
NativeDecoding = Callable[
    [torch.Tensor, torch.Tensor | None, SamplingParams, Callable[[], Any], OnToken | None], Any
]
Fallback = Callable[[str, Callable[[], Any]], Any]


def serve_generate(
    original: Callable[..., Any],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    native: NativeDecoding,
    fallback: Fallback,
    note: Callable[[str], None],
) -> Any:
    """Serve one ``module.generate(*inputs, **kwargs)``.

    Args:
        original: The generate that the module has without us.
        inputs: Positional arguments of generate.
        kwargs: Keyword arguments of generate.
        native: Samples left-padded ids [B, T] with mask and parameters; returns
            each row's new tokens, or what HF's decoding (the fourth argument) returns
            where our loop can't serve the model. The last argument hears each token of
            the only row.
        fallback: Runs HF's decoding over whole weights, given the reason.
        note: Writes down what the answer lacks.

    Returns:
        What HF's generate returns.

    Raises:
        ConfigError: HF's continuous batching is asked for.
    """
    inputs, kwargs = _named(inputs, kwargs)
    if len(inputs) > _NUM_POSITIONAL:
        # For Python to refuse.
        return original(*inputs, **kwargs)
    # Weights are whole: no rank needs the others' forwards.
    kwargs["synced_gpus"] = False
    if kwargs.get("cache_implementation") == "paged":
        raise ConfigError(
            explain(
                "generate's cache_implementation 'paged' is HF's continuous batching, on "
                "threads of its own that no weights are gathered for",
                expected="another cache, or none named",
                got="cache_implementation='paged'",
                hint="Leave it out: our loop pages and batches continuously as it is.",
            )
        )

    def hf_generate() -> Any:
        return original(*inputs, **kwargs)

    own = _asked_of_hf(kwargs)
    if own:
        return fallback(", ".join(own), hf_generate)
    streamer = kwargs.get("streamer")

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        if isinstance(vars(model).get("_cache"), StaticCache):
            # transformers 5.10 keeps a static cache there, and the next call trips over one that
            # no forward has filled; it makes another where it needs one.
            del model._cache
        reason = _not_served(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            model.config.get_text_config(decoder=True).vocab_size,
        )
        if reason is None and streamer is not None and input_ids.shape[0] > 1:
            # Our rows don't advance in step.
            reason = "a streamer of several rows"
        if reason is not None:
            return fallback(reason, hf_generate)
        params = _sampling_params(input_ids, generation_config)
        stream = _Stream(streamer, input_ids) if streamer is not None else None
        mask = model_kwargs.get("attention_mask")
        new = native(input_ids, mask, params, hf_generate, stream.put if stream else None)
        if not isinstance(new, list):
            return new
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate and generation_config.use_cache:
            note("the output holds no key-value cache: ours is paged and stays with the engine")
        return _output(input_ids, new, generation_config)

    # With the streamer HF would stream the prompt now, and again where it decodes itself.
    rest = {name: value for name, value in kwargs.items() if name != "streamer"}
    return original(*inputs, **{**rest, "custom_generate": decode})


class _Stream:
    """Hands a streamer what HF's loop does: the prompt, then token by token."""

    def __init__(self, streamer: Any, input_ids: torch.Tensor) -> None:
        self._streamer = streamer
        self._prompt: torch.Tensor | None = input_ids.cpu()

    def put(self, token: int) -> None:
        """Take one token of the only row."""
        if self._prompt is not None:
            # Not before: where HF's own decoding serves the model, it streams the prompt.
            prompt, self._prompt = self._prompt, None
            self._streamer.put(prompt)
        self._streamer.put(torch.tensor([token]))


def _named(
    inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All but the ids and the config by name; unless one is given twice, or too many."""
    named = dict(zip(_PARAMETERS[_NUM_POSITIONAL:], inputs[_NUM_POSITIONAL:], strict=False))
    if len(inputs) > len(_PARAMETERS) or named.keys() & kwargs.keys():
        return inputs, dict(kwargs)
    return inputs[:_NUM_POSITIONAL], {**kwargs, **named}


def _asked_of_hf(arguments: dict[str, Any]) -> list[str]:
    """Names of arguments that only HF's own decodings honour."""
    given = {name: arguments.get(name) for name in _OWN_DECODING}
    return [
        name
        for name, value in given.items()
        if not (value is None or (name == "num_beams" and value == 1))
        and not (isinstance(value, list) and not value)
    ]


def _not_served(
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    vocab_size: int,
) -> str | None:
    """What our loop would have to leave out, by name; None if nothing."""
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        return str(getattr(mode, "value", mode))
    for processor in processors:
        if type(processor) not in _SERVED_PROCESSORS:
            return type(processor).__name__
    reason = _unlike_ours(processors, config, model_kwargs.get("attention_mask"), vocab_size)
    if reason is not None:
        return reason
    for criterion in criteria:
        if type(criterion) not in _SERVED_CRITERIA:
            return type(criterion).__name__
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            return name
    foreign = sorted(
        name
        for name, value in model_kwargs.items()
        if value is not None and name not in _MODEL_KWARGS
    )
    if foreign:
        return ", ".join(foreign)
    if config.cache_implementation == "quantized":
        return "cache_implementation 'quantized', which changes the tokens"
    if config.is_assistant:
        return "is_assistant"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        return "an attention_mask that is not left-padded"
    positions = model_kwargs.get("position_ids")
    if positions is not None and not _are_default(positions, mask, input_ids.shape[1]):
        return "position_ids of its own"
    if input_ids.numel() == 0:
        return "an empty prompt"
    if config.do_sample and config.top_p == 0:
        return "top_p of 0"
    return None


def _unlike_ours(
    processors: LogitsProcessorList,
    config: GenerationConfig,
    mask: torch.Tensor | None,
    vocab_size: int,
) -> str | None:
    """What a served processor does that ours does not; None if nothing."""
    is_padded = mask is not None and bool((mask == 0).any())
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor) and is_padded:
            # transformers before 5.24 counts padding as seen.
            if isinstance(processor.prompt_ignore_length, torch.Tensor):
                continue
            return "a repetition penalty that counts padding as seen"
    if any(len(tokens) > 1 for tokens, _ in _bias_pairs(config.sequence_bias)):
        return "sequence_bias of several tokens"
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        # HF lets them pass; we would refuse them.
        if any(not 0 <= token < vocab_size for token in getattr(config, name) or ()):
            return f"{name} outside the vocabulary"
    if is_padded and config.bad_words_ids:
        assert mask is not None
        if max(map(len, config.bad_words_ids)) > int(mask.sum(1).min()) + 1:
            return "bad_words_ids that reach into padding"
    return None


def _are_default(positions: torch.Tensor, mask: torch.Tensor | None, length: int) -> bool:
    if mask is None:
        # Positions of another length are what is left of a mask of ones that HF has dropped.
        if positions.shape[-1] != length:
            return False
        ours = torch.arange(positions.shape[-1], device=positions.device).expand_as(positions)
        return bool((positions == ours).all())
    ours = mask.long().cumsum(-1) - 1
    return bool(((positions == ours) | (mask == 0)).all())


def _sampling_params(input_ids: torch.Tensor, config: GenerationConfig) -> SamplingParams:
    """The generation config in our words; HF has checked and completed it."""
    new = config.max_length - input_ids.shape[1]
    if new < 1:
        raise ConfigError(
            explain(
                "generate needs room for at least one new token",
                expected="max_new_tokens >= 1",
                got=f"max_length {config.max_length} with {input_ids.shape[1]} input tokens",
                hint="Raise max_new_tokens.",
            )
        )
    least = max(config.min_length or 0, 0) - input_ids.shape[1]
    least = max(least, config.min_new_tokens or 0, 0)
    sampled = bool(config.do_sample)
    eos = config._eos_token_tensor
    params = SamplingParams(
        max_new_tokens=new,
        min_new_tokens=min(least, new),
        temperature=_or(config.temperature, 1.0) if sampled else 0.0,
        top_k=int(_or(config.top_k, 0)) if sampled else 0,
        top_p=_or(config.top_p, 1.0) if sampled else 1.0,
        min_p=_or(config.min_p, 0.0) if sampled else 0.0,
        repetition_penalty=_or(config.repetition_penalty, 1.0),
        logit_bias={int(t[0]): float(bias) for t, bias in _bias_pairs(config.sequence_bias)},
        bad_words_ids=[list(map(int, word)) for word in config.bad_words_ids or ()],
        suppress_tokens=list(map(int, config.suppress_tokens or ())),
        begin_suppress_tokens=list(map(int, config.begin_suppress_tokens or ())),
        # HF forces BOS where it begins the padded row.
        forced_bos_token_id=config.forced_bos_token_id if input_ids.shape[1] == 1 else None,
        forced_eos_token_id=config.forced_eos_token_id,
        seed=0,
        eos_token_id=[] if eos is None else [int(token) for token in eos.flatten()],
        logprobs=False,
    )
    # One draw from torch's generator: calls differ, torch.manual_seed repeats them.
    return replace(params, seed=int(torch.randint(2**62, (1,)))) if sampled else params


def _bias_pairs(sequence_bias: Any) -> list[tuple[Sequence[int], float]]:
    """HF's biases of token sequences, from either of its forms."""
    if sequence_bias is None:
        return []
    return list(sequence_bias.items() if isinstance(sequence_bias, dict) else sequence_bias)


def _output(
    input_ids: torch.Tensor, new: list[list[int]], config: GenerationConfig
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Input and new tokens, right-padded, in HF's shape."""
    width = max(len(tokens) for tokens in new)
    pad = config._pad_token_tensor
    filler = int(pad) if pad is not None else 0
    rows = [tokens + [filler] * (width - len(tokens)) for tokens in new]
    tail = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    sequences = torch.cat([input_ids, tail], dim=1)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast("torch.LongTensor", sequences))
    return sequences


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
