"""What a trainer's GenerationConfig asks for, in our words or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tritonhybrid.errors import ConfigError, explain
from tritonhybrid.sampling_params import SamplingParams

# GenerationConfig's name of a setting, and SamplingParams'.
_SERVED = {
    "bad_words_ids": "bad_words_ids",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "eos_token_id": "eos_token_id",
    "forced_bos_token_id": "forced_bos_token_id",
    "forced_eos_token_id": "forced_eos_token_id",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "num_return_sequences": "n",
    "repetition_penalty": "repetition_penalty",
    "suppress_tokens": "suppress_tokens",
}
# Those that HF's greedy decoding doesn't look at.
_WARPERS = ("temperature", "top_k", "top_p", "min_p")
# HF's own where no config says any.
_DEFAULT_TOP_K = 50
# What would change the tokens and has no word in SamplingParams, with the values that are off.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}


def sampling_params(*configs: Any, settled: Mapping[str, Any] | None = None) -> SamplingParams:
    """Sampling settings of several GenerationConfigs, merged as HF's generate merges them.

    Args:
        configs: GenerationConfigs; of each setting the first that is not None counts.
        settled: Settings by GenerationConfig's names that no config is asked for.

    Returns:
        The same in our words; temperature 0 where ``do_sample`` is off.

    Raises:
        ConfigError: A setting has no counterpart, or its value is out of range.
    """
    fixed = dict(settled or {})

    def setting(name: str) -> Any:
        if name in fixed:
            return fixed[name]
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    for name, off in _UNSERVED.items():
        value = setting(name)
        if value is not None and value not in off:
            raise ConfigError(
                explain(
                    f"A rollout has no counterpart of generation_config.{name}",
                    expected="it to be off",
                    got=f"{name}={value!r}",
                    hint="Take it out of the generation config, or call module.generate, which "
                    "serves it on Hugging Face's own loop.",
                )
            )
    asked = {ours: setting(theirs) for theirs, ours in _SERVED.items()}
    asked["logit_bias"] = _logit_bias(setting("sequence_bias"))
    if setting("do_sample"):
        asked |= {name: setting(name) for name in _WARPERS}
        if asked["top_k"] is None:
            asked["top_k"] = _DEFAULT_TOP_K
    else:
        asked["temperature"] = 0.0
    return SamplingParams(**{name: value for name, value in asked.items() if value is not None})


def _logit_bias(sequence_bias: Any) -> dict[int, float] | None:
    """HF's biases of token sequences, each of one token."""
    if not sequence_bias:
        return None
    pairs = sequence_bias.items() if isinstance(sequence_bias, Mapping) else sequence_bias
    if any(len(tokens) != 1 for tokens, _ in pairs):
        raise ConfigError(
            explain(
                "generation_config.sequence_bias is served for single tokens",
                expected="sequences of one token",
                got="a longer one",
                hint="Take it out of the generation config, or call module.generate, which "
                "serves it on Hugging Face's own loop.",
            )
        )
    return {int(tokens[0]): float(bias) for tokens, bias in pairs}
