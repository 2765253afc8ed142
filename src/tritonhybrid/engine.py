"""The class of a wrapped engine: hands each call on, and holds no algorithm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from collections.abc import Sequence as Sized
from contextlib import AbstractContextManager, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from tritonhybrid.call import Call
from tritonhybrid.call_observer import CallObserver
from tritonhybrid.call_trace import CallTrace, rank_path
from tritonhybrid.config import HybridConfig
from tritonhybrid.containers.parts import causal_model, own_generate
from tritonhybrid.engine_compat import SeedSurface
from tritonhybrid.engine_state import EngineState, world_size
from tritonhybrid.errors import EngineStateError, explain
from tritonhybrid.hf_generate import serve_generate
from tritonhybrid.requests import Limits, Prompts, build_sequences, completions
from tritonhybrid.rollout_output import Completion, PausedRollout, RolloutOutput
from tritonhybrid.rollout_stream import CallerModes, RolloutStream, stream_steps
from tritonhybrid.sampling_params import SamplingParams
from tritonhybrid.sequence import Sequence
from tritonhybrid.stats import LatencyReport, RolloutStats

if TYPE_CHECKING:
    # The class that wrap puts in front of the engine's own; deepspeed is untyped.
    class _Base(SeedSurface, deepspeed.DeepSpeedEngine):  # type: ignore[misc]
        pass
else:
    _Base = SeedSurface

logger = logging.getLogger("tritonhybrid")

# All that a wrapped engine has more than a plain one is in this one attribute.
STATE = "_tritonhybrid"


class HybridEngine(_Base):
    """The class a wrapped engine gets, in front of its own.

    ``isinstance(engine, deepspeed.DeepSpeedEngine)`` stays true and every reference
    to the engine stays right; all state is one object in its ``__dict__``.
    """

    def rollout(
        self,
        prompts: Prompts,
        sampling: SamplingParams | Sized[SamplingParams] | None = None,
        *,
        uids: Sized[int] | None = None,
        attention_mask: torch.Tensor | None = None,
        token_budget: int | None = None,
        max_num_seqs: int | None = None,
        progress: bool = False,
    ) -> RolloutOutput:
        """Sample completions of ragged prompts from the weights being trained.

        With ZeRO-3 every rank must call this together; an empty list is allowed. Not so
        where the caller has gathered the weights: then a rank neither owes the others a
        call nor hears of their failures.
        Torch's generators and the training state are not touched.

        Args:
            prompts: Lists of token ids; or a [B, T] integer tensor whose columns
                are all tokens unless ``attention_mask`` says otherwise.
            sampling: For all prompts, or one each; None is SamplingParams().
            uids: Identity of each prompt's noise, distinct 64-bit integers. With
                them the tokens don't depend on rank or world size.
            attention_mask: [B, T], 1 on real tokens; only with a tensor.
            token_budget: Tokens of all completions together, on this rank, after which the
                call stops at the end of a step; :meth:`resume` goes on. None sets no limit.
            max_num_seqs: Most sequences in flight; None leaves it to the settings, which
                it can't exceed.
            progress: Show this rank's completions, tokens/s and the time left on stderr, on
                rank 0 only.

        Returns:
            n completions a prompt, adjacent, in input order.

        Raises:
            ConfigError: An argument is refused; nothing has run.
            CacheExhaustedError: A sequence can't fit the cache.
            NonFiniteLogitsError: The model gave NaN or infinite logits.
            RankFailureError: Another rank failed.
        """
        state = state_of(self)
        with state.call("rollout", token_budget, max_num_seqs, _bar_if(progress)) as call:
            sequences = self._sequences(call, prompts, sampling, uids, attention_mask)
            state.generation.run(sequences, call)
            call.count(sequences)
        return _output(state, call, sequences)

    def resume(
        self,
        paused: PausedRollout | None,
        *,
        token_budget: int | None = None,
        progress: bool = False,
    ) -> RolloutOutput:
        """Go on with a rollout whose token budget was spent, from the weights as they are now.

        Without an optimizer step and without another call in between every sequence gets
        the tokens and log-probabilities of an uninterrupted rollout, bit for bit. After a
        step what it holds so far is computed anew; ``policy_versions`` says which weights
        sampled which token. With ZeRO-3 every rank must call this together.

        Args:
            paused: From ``RolloutOutput.paused``; None on a rank that has nothing left.
            token_budget: As in :meth:`rollout`.
            progress: As in :meth:`rollout`.

        Returns:
            The completions that had not ended, whole, in input order.

        Raises:
            EngineStateError: The rollout was resumed before, or is another engine's.
            RankFailureError: Another rank failed; nothing is lost, resume the same again.
        """
        state = state_of(self)
        with state.call("resume", token_budget, observers=_bar_if(progress)) as call:
            sequences = paused.take_up(state.generation) if paused is not None else []
            call.resumed = paused
            # Some have ended where an earlier attempt failed, on this rank or another.
            left = [sequence for sequence in sequences if not sequence.is_finished]
            for sequence in left:
                sequence.policy_version = call.policy_version
            state.generation.run(left, call)
            call.count(sequences)
        if paused is not None:
            paused.is_resumed = True
        return _output(state, call, sequences)

    def rollout_stream(
        self,
        prompts: Prompts,
        sampling: SamplingParams | Sized[SamplingParams] | None = None,
        *,
        uids: Sized[int] | None = None,
        attention_mask: torch.Tensor | None = None,
        token_budget: int | None = None,
        progress: bool = False,
    ) -> RolloutStream:
        """Sample completions and hand over each as soon as it has finished.

        With ZeRO-3 every rank must call this together and exhaust or close its stream; the
        last of them within ``sync_timeout_s`` of the first. An error that leaves the
        stream's ``with`` block is a failure of this rank, which the others hear of.

        Args:
            prompts: As in :meth:`rollout`.
            sampling: As in :meth:`rollout`.
            uids: As in :meth:`rollout`.
            attention_mask: As in :meth:`rollout`.
            token_budget: As in :meth:`rollout`; what it cuts short does not come out, see
                ``RolloutStream.paused``.
            progress: As in :meth:`rollout`.

        Returns:
            An iterator over completions, in the order in which they finish.

        Raises:
            ConfigError: An argument is refused; nothing has run.
            RankFailureError: Another rank failed.
        """
        state = state_of(self)
        modes = CallerModes(state.generation.device)
        begun: list[tuple[Call, Sized[Sequence]]] = []

        def steps() -> Generator[Completion | None, None, None]:
            with state.call("rollout_stream", token_budget, observers=_bar_if(progress)) as call:
                sequences = self._sequences(call, prompts, sampling, uids, attention_mask)
                begun.append((call, sequences))
                serving = state.generation.serve(sequences, call)
                with call.interrupts.opened():
                    try:
                        yield None
                    except GeneratorExit:
                        call.is_given_up = True
                # The module is HF's again, and the pages are free, before an error is told. That
                # the stream is closed is none, but comes back from yield from all the same.
                with closing(serving), suppress(GeneratorExit):
                    yield from stream_steps(serving, call, state.generation.tokenizer, modes)
                call.count([s for s in sequences if s.is_finished])

        stream = steps()
        next(stream)
        call, sequences = begun[0]
        return RolloutStream(call, sequences, cast("Generator[Completion, None, None]", stream))

    def _sequences(
        self,
        call: Call,
        prompts: Prompts,
        sampling: SamplingParams | Sized[SamplingParams] | None,
        uids: Sized[int] | None,
        attention_mask: torch.Tensor | None,
    ) -> list[Sequence]:
        """Checked sequences of a rollout."""
        return build_sequences(
            prompts,
            sampling if sampling is not None else SamplingParams(),
            _limits(self, state_of(self)),
            seed=call.seed,
            uids=uids,
            attention_mask=attention_mask,
            policy_version=call.policy_version,
        )

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """Generate with Hugging Face's contract, whatever the ZeRO stage.

        Greedy decoding gives HF's tokens, sampling HF's processed distributions;
        ``do_sample`` takes one integer from torch's generator. What our loop does
        not serve (beams, custom processors, scores, ...) runs HF's own decoding over
        whole weights, announced once; docs/generate.md has every argument's way.

        Args:
            inputs: As ``GenerationMixin.generate`` takes them.
            kwargs: The same.

        Returns:
            [B * num_return_sequences, T + new] token ids, or a ModelOutput when
            ``return_dict_in_generate``.

        Raises:
            ValueError: HF refuses an argument, by name.
            ConfigError: The lengths exceed the model's or the cache's limit.
            RankFailureError: Another rank failed.
        """
        state = state_of(self)
        generation = state.generation
        module: nn.Module = self.module
        own = state.had_generate
        original = own if own is not None else own_generate(module)

        with state.call("generate") as call:

            def native(
                input_ids: torch.Tensor,
                mask: torch.Tensor | None,
                params: SamplingParams,
                hf_decoding: Callable[[], Any],
                on_token: Callable[[int], None] | None,
            ) -> Any:
                sequences = build_sequences(
                    input_ids,
                    params,
                    _limits(self, state),
                    seed=0,
                    attention_mask=mask,
                )
                if on_token is not None:
                    # A streamer may wait for its reader, and Ctrl-C must reach it.
                    sequences[0].on_token = lambda token: call.interrupts.let_through(
                        partial(on_token, token)
                    )
                theirs = generation.run(
                    sequences,
                    call,
                    hf_decoding,
                    is_padded=mask is not None and not bool(mask.all()),
                )
                call.count(sequences)
                return theirs if theirs is not None else [s.output for s in sequences]

            def fallback(reason: str, decode: Any) -> Any:
                return generation.run_hf_decoding(reason, decode, call)

            out = serve_generate(original, inputs, kwargs, native, fallback, call.stats.note)
            if call.stats.path == "hf":
                _count_decoded(call, inputs, kwargs, out, module)
            return out

    def trace(self, path: str | Path) -> AbstractContextManager[CallTrace]:
        """Record every call inside a ``with`` block for a trace viewer such as Perfetto.

        The file holds counts and times, no prompt text and no token ids. It is written also
        where the block is left by an exception. On one rank it is ``path``; of several, each
        that enters the block writes its own, ``trace.json`` becoming ``trace.rank0.json``.

        Args:
            path: Replaced if it is there.

        Raises:
            ConfigError: Its directory is not there, or it is one.
        """
        own = rank_path(path, _rank(), world_size())
        return state_of(self).traced(own, _rank())

    @property
    def stats(self) -> RolloutStats:
        """Figures of the latest rollout or generate call."""
        return state_of(self).stats

    @property
    def latency_report(self) -> LatencyReport | None:
        """DeepSpeed's report of the last eval-to-eval cycle; None before the second eval."""
        return state_of(self).stats.latency

    @property
    def hybrid_config(self) -> HybridConfig:
        """The settings in force."""
        return state_of(self).config

    def eval(self) -> Any:
        """Switch to evaluation; logs DeepSpeed's latency report of the last cycle.

        Returns:
            What the base engine's ``eval`` returns.
        """
        state = state_of(self)
        report = state.clock.on_eval() or state.stats.latency
        state.stats.latency = report
        if report is not None and _rank() == 0:
            logger.info("%s", report.line())
        return super().eval()

    def train(self, mode: bool = True) -> Any:
        """Switch to training; gives the cache back if ``release_inference_cache``.

        Returns:
            What the base engine's ``train`` returns.
        """
        state = state_of(self)
        state.require_idle("train")
        if mode:
            state.clock.on_train()
            if state.config.release_inference_cache:
                state.generation.release()
        return super().train(mode)

    def step(self, lr_kwargs: Any = None) -> Any:
        """Take an optimizer step; the next rollout uses the new weights.

        Returns:
            What the base engine's ``step`` returns.
        """
        state = state_of(self)
        state.require_idle("step")
        result = super().step(lr_kwargs=lr_kwargs)
        state.use_new_weights(self.global_steps)
        state.clock.on_step()
        return result

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Train or evaluate as the base engine does.

        Raises:
            EngineStateError: A rollout is under way: its module is in our hands.
        """
        state_of(self).require_idle("forward")
        return super().forward(*inputs, **kwargs)

    def load_checkpoint(self, *inputs: Any, **kwargs: Any) -> Any:
        """Load as the base engine does; the next rollout uses what was loaded."""
        state = state_of(self)
        state.require_idle("load_checkpoint")
        result = super().load_checkpoint(*inputs, **kwargs)
        state.use_new_weights(self.global_steps)
        return result


def state_of(engine: Any) -> EngineState:
    """What a wrapped engine has more than a plain one.

    Raises:
        EngineStateError: It is not wrapped.
    """
    state: EngineState | None = engine.__dict__.get(STATE)
    if state is None:
        raise EngineStateError(
            explain(
                "The engine is not wrapped",
                expected="an engine that tritonhybrid.wrap has upgraded",
                got=type(engine).__name__,
                hint="Call tritonhybrid.wrap(engine) first.",
            )
        )
    return state


def _output(state: EngineState, call: Call, sequences: Sized[Sequence]) -> RolloutOutput:
    done = completions(sequences, state.generation.tokenizer)
    return RolloutOutput(completions=done, stats=call.stats, paused=call.paused)


def _count_decoded(
    call: Call, inputs: tuple[Any, ...], kwargs: dict[str, Any], out: Any, module: nn.Module
) -> None:
    """Count what HF's own decoding returned, where it began with token ids."""
    given = inputs[0] if inputs else kwargs.get("input_ids", kwargs.get("inputs"))
    rows = getattr(out, "sequences", out)
    if isinstance(given, torch.Tensor) and isinstance(rows, torch.Tensor):
        config = causal_model(module).generation_config
        pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
        call.count_decoded(given, kwargs.get("attention_mask"), rows, pad)


def _limits(engine: Any, state: EngineState) -> Limits:
    model = causal_model(engine.module)
    config = model.config.get_text_config(decoder=True)
    limit, name = getattr(config, "max_position_embeddings", None), "max_position_embeddings"
    asked = state.config.max_out_tokens
    if asked is not None and (limit is None or asked < limit):
        limit, name = asked, "max_out_tokens"
    eos = getattr(model.generation_config, "eos_token_id", None)
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return Limits(
        vocab_size=int(config.vocab_size),
        max_length=limit,
        max_length_name=name,
        eos_token_ids=ends,
        rank=_rank(),
        has_tokenizer=state.generation.tokenizer is not None,
    )


def _bar_if(progress: bool) -> list[CallObserver]:
    """Who shows a call's progress on this rank."""
    if not progress or _rank() != 0:
        return []
    # The one thing here that draws; a call without it never loads rich.
    from tritonhybrid.progress_bar import ProgressBar

    return [ProgressBar()]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
