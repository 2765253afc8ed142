"""Where the time and the bytes of a call went, and which path served it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RolloutStats:
    """Figures of one ``rollout`` or ``generate`` call; seconds, tokens, bytes.

    Args:
        path: "fused" (every layer in our containers), "generic" (at least one layer
            in HF's own code over our attention and cache) or "hf" (HF's loop).
        layer_paths: Layers per path and reason.
        backend: "torch" or "triton".
        sampler: Which sampler drew the tokens.
        strategy: How the weights were made whole: resident, pinned or foreign.
        gather_s: Seconds spent gathering weights (ZeRO-3).
        gather_bytes: Bytes gathered.
        bind_s: Seconds spent binding containers, probing included.
        sync_s: Seconds spent waiting for other ranks where the call meets them; what a
            gather waits is in ``gather_s``.
        prefill_s: Seconds in prompt steps, mixed ones included.
        decode_s: Seconds in decode steps; HF's own loops count all of theirs here.
        total_s: Seconds of the whole call.
        prompt_tokens: Prompt tokens asked for, counted once a prompt.
        prefill_tokens: Tokens computed in prompt steps, recomputed ones included (sharing
            makes it smaller than n times the prompts).
        shared_tokens: Tokens of prompts that were not computed, their pages being shared.
        decode_tokens: Tokens sampled for running sequences and kept.
        mixed_decode_tokens: Those of them that came out of mixed steps.
        overrun_tokens: Tokens sampled past an end and cut.
        completion_tokens: Tokens of the returned completions.
        num_prefill_steps: Steps with prompts, mixed ones included.
        num_decode_steps: Decode steps: forwards of one token a sequence.
        preemptions: Sequences set back and recomputed for want of pages.
        peak_blocks: Most cache pages in use at once.
        graph_hits: Replays of captured decode steps.
        graph_captures: Decode steps captured in the call, of a number of rows each.
        graph_recaptures: Captured steps thrown away because an address had changed.
        graph_reason: Why decode steps, all or some, were not replayed; empty where all were.
        shared_blocks: Most cache pages that stood in more than one table at once, as each
            step left them.
        evicted_blocks: Pages of earlier use that were overwritten for want of others.
        kv_bytes: Size of the key-value cache.
        extra_weight_bytes: Weight bytes allocated beyond the training copy.
        notes: Announced decisions, in words.
        latency: DeepSpeed's report of the last eval-to-eval cycle; None before the second
            ``eval()``.
    """

    path: str = ""
    layer_paths: dict[str, int] = field(default_factory=dict)
    backend: str = ""
    sampler: str = ""
    strategy: str = ""
    gather_s: float = 0.0
    gather_bytes: int = 0
    bind_s: float = 0.0
    sync_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    decode_tokens: int = 0
    mixed_decode_tokens: int = 0
    overrun_tokens: int = 0
    completion_tokens: int = 0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    preemptions: int = 0
    peak_blocks: int = 0
    graph_hits: int = 0
    graph_captures: int = 0
    graph_recaptures: int = 0
    graph_reason: str = ""
    shared_blocks: int = 0
    evicted_blocks: int = 0
    kv_bytes: int = 0
    extra_weight_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    latency: LatencyReport | None = None

    @property
    def tokens_per_s(self) -> float:
        """Returned tokens per second of the whole call."""
        return _rate(self.completion_tokens, self.total_s)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens computed per second of prompt steps, a mixed step's decoded ones included.

        0.0 where no prompt step was timed, as in HF's own loops.
        """
        return _rate(self.prefill_tokens + self.mixed_decode_tokens, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens kept per second of decode steps, without those of mixed steps."""
        return _rate(self.decode_tokens - self.mixed_decode_tokens, self.decode_s)

    def summary(self) -> str:
        """The call as one log line."""
        return (
            f"{self.completion_tokens} tokens in {self.total_s:.2f} s "
            f"({self.tokens_per_s:,.1f} tokens/s): "
            f"path {self.path or 'none'}, backend {self.backend or 'none'}, "
            f"weights {self.strategy or 'none'} "
            f"(gather {self.gather_s:.2f} s, sync {self.sync_s:.2f} s), bind {self.bind_s:.2f} s, "
            f"prefill {self.prefill_s:.2f} s ({self.prefill_tokens} tokens, "
            f"{self.shared_tokens} shared, {self.prefill_tokens_per_s:,.1f} tokens/s), "
            f"decode {self.decode_s:.2f} s ({self.decode_tokens} tokens, "
            f"{self.overrun_tokens} overrun, {self.decode_tokens_per_s:,.1f} tokens/s), "
            f"pages {self.peak_blocks} used, {self.shared_blocks} shared, "
            f"{self.evicted_blocks} evicted, {self.preemptions} preemptions"
        )

    def note(self, text: str) -> None:
        """Write a decision down once."""
        if text not in self.notes:
            self.notes.append(text)


def _rate(num_tokens: int, seconds: float) -> float:
    return num_tokens / seconds if seconds > 0 else 0.0


@dataclass(kw_only=True)
class LatencyReport:
    """DeepSpeed's hybrid-engine report: seconds of one eval-to-eval cycle."""

    e2e_s: float
    gather_s: float
    generate_s: float
    training_s: float
    samples: int | None
    mean_e2e_s: float

    @property
    def others_s(self) -> float:
        """Seconds neither generating nor training."""
        return self.e2e_s - (self.gather_s + self.generate_s + self.training_s)

    def line(self) -> str:
        """The report as one log line, in DeepSpeed's order."""

        def part(name: str, seconds: float) -> str:
            return f"|{name}={seconds:.2f}s ({100 * seconds / max(self.e2e_s, 1e-9):.2f}%) "

        text = f"|E2E latency={self.e2e_s:.2f}s " + part("Gather latency", self.gather_s)
        text += part("Generate time", self.generate_s) + part("Training time", self.training_s)
        text += part("Others", self.others_s)
        if self.samples is not None:
            text += f"|CurSamplesPerSec={self.samples / max(self.e2e_s, 1e-9):.2f} "
            text += f"|AvgSamplesPerSec={self.samples / max(self.mean_e2e_s, 1e-9):.2f}"
        return text.rstrip()
