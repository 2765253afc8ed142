"""TRL's trainers over a wrapped engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import deepspeed

from tritonhybrid.config import HybridConfig
from tritonhybrid.containers.parts import causal_model
from tritonhybrid.engine import HybridEngine
from tritonhybrid.errors import ConfigError, EngineStateError, explain
from tritonhybrid.integrations.generation_config import sampling_params
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.wrapping import wrap

logger = logging.getLogger("tritonhybrid")


def attach(trainer: Any, *, config: HybridConfig | Mapping[str, Any] | None = None) -> HybridEngine:
    """Have a TRL trainer generate with the engine it trains.

    Wraps the trainer's DeepSpeed engine if it isn't yet, which serves
    ``module.generate``. A GRPOTrainer also gets a ``rollout_func``, which samples
    without a gather by TRL and gives TRL the sampler's log-probabilities; where it can't
    stand in for TRL's own generation (tools, images, settings that only HF's loop knows)
    ``module.generate`` serves, and the log says why.

    The engine exists once training begins, so attach from a callback::

        class Attach(transformers.TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                tritonhybrid.trl.attach(trainer)

        trainer.add_callback(Attach())

    Every rank must call this together, as it must ``tritonhybrid.wrap``.

    Args:
        trainer: A TRL trainer that trains with DeepSpeed.
        config: Settings for ``tritonhybrid.wrap``.

    Returns:
        The wrapped engine.

    Raises:
        ConfigError: No such trainer, one without DeepSpeed, or one that is told to
            generate elsewhere.
        EngineStateError: The trainer has no engine yet, or a wrapped one that ``config``
            comes too late for.
    """
    engine = _engine(trainer)
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(trainer, name, False):
            raise ConfigError(
                explain(
                    "An attached trainer generates with the engine it trains",
                    expected=f"{name}=False",
                    got=f"{name}=True",
                    hint=f"Set {name}=False in the trainer's arguments.",
                )
            )
    if not isinstance(engine, HybridEngine):
        engine = wrap(engine, config=config)
    elif config is not None:
        raise EngineStateError(
            explain(
                "An engine is wrapped once",
                expected="no config for an engine that is wrapped already",
                got="a config",
                hint="Pass the config where the engine is first wrapped, or unwrap it before.",
            )
        )
    reason = _why_not_ours(trainer, engine)
    if reason is None:
        trainer.rollout_func = TrlRollout()
    else:
        logger.warning("tritonhybrid: module.generate serves this trainer: %s", reason)
    return engine


class TrlRollout:
    """GRPOTrainer's ``rollout_func`` over the trainer's own engine."""

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Sample one completion a prompt, as TRL's own generation would be asked to.

        Under ZeRO-3 every rank must call this together, which TRL does.

        Args:
            prompts: Texts or conversations of this rank; TRL repeats a prompt for each of its
                generations.
            trainer: Whose engine, tokenizer and generation settings count.

        Returns:
            prompt_ids, completion_ids and logprobs, a list a prompt each; the
            log-probabilities are of the distribution sampled from.

        Raises:
            EngineStateError: The trainer's engine is not wrapped (any more).
            ConfigError: A prompt holds an image, or a setting is refused.
        """
        engine = _engine(trainer)
        if not isinstance(engine, HybridEngine):
            raise EngineStateError(
                explain(
                    "An attached trainer needs its wrapped engine",
                    expected="the engine that attach wrapped",
                    got="one that is not wrapped",
                    hint="Call tritonhybrid.trl.attach(trainer) again, or set "
                    "trainer.rollout_func to None.",
                )
            )
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        if images is not None:
            raise ConfigError(
                explain(
                    "A rollout reads token ids",
                    expected="prompts of text",
                    got="prompts with images",
                    hint="Set trainer.rollout_func to None: module.generate serves them.",
                )
            )
        done = engine.rollout(prompt_ids, _sampling(trainer, engine)).completions
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [completion.token_ids for completion in done],
            "logprobs": [completion.logprobs for completion in done],
        }


def _engine(trainer: Any) -> Any:
    """The trainer's DeepSpeed engine, wrapped or not."""
    if not hasattr(trainer, "accelerator") or not hasattr(trainer, "model_wrapped"):
        raise ConfigError(
            explain(
                "attach takes a trainer of TRL",
                expected="a GRPOTrainer or another that transformers' Trainer underlies",
                got=type(trainer).__name__,
                hint="For a DeepSpeed engine of your own call tritonhybrid.wrap(engine).",
            )
        )
    engine = trainer.model_wrapped
    if isinstance(engine, deepspeed.DeepSpeedEngine):
        return engine
    if not getattr(trainer, "is_deepspeed_enabled", False):
        raise ConfigError(
            explain(
                "attach needs a trainer that trains with DeepSpeed",
                expected="a DeepSpeed engine around the model",
                got=f"{type(engine).__name__} without DeepSpeed",
                hint="Pass deepspeed=... in the trainer's arguments, or launch with an "
                "accelerate configuration that names DeepSpeed.",
            )
        )
    raise EngineStateError(
        explain(
            "The trainer makes its DeepSpeed engine when training begins",
            expected="a trainer whose train() has started",
            got="one without an engine",
            hint="Call attach from a TrainerCallback's on_train_begin.",
        )
    )


def _why_not_ours(trainer: Any, engine: HybridEngine) -> str | None:
    """Why TRL's own generation can't be stood in for, in words; None if it can."""
    if not hasattr(trainer, "rollout_func"):
        return f"{type(trainer).__name__} has no rollout_func"
    if not isinstance(trainer.rollout_func, TrlRollout | None):
        return "it has a rollout_func of its own"
    if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
        return "TRL calls generate itself after each tool"
    if getattr(trainer, "_is_vlm", False):
        return "its prompts may hold images"
    for name in ("_tokenize_prompts", "generation_config"):
        if not hasattr(trainer, name):
            return f"this version of TRL has no {name}"
    try:
        _sampling(trainer, engine)
    except ConfigError as error:
        return str(error)
    return None


def _sampling(trainer: Any, engine: HybridEngine) -> SamplingParams:
    """The trainer's sampling settings, over the model's as in HF's generate."""
    own = causal_model(engine.module).generation_config
    # TRL asks for one completion of each of its repeated prompts.
    return sampling_params(trainer.generation_config, own, settled={"num_return_sequences": 1})
