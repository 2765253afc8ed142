"""tritonhybrid as a contestant."""

from __future__ import annotations

from typing import Any

from gate import Tokens
from provider import Provider
from workloads import Workload


def tritonhybrid_rollout(
    engine: Any,
    workload: Workload,
    *,
    rank: int = 0,
    torch_ops: tuple[str, ...] = (),
    backend: str = "auto",
) -> Provider:
    """``engine.rollout`` on a DeepSpeed engine that this call wraps.

    Args:
        torch_ops: ops that take their torch path because their test failed on this device.
    """
    import tritonhybrid

    wrapped = tritonhybrid.wrap(engine, config={"backend": backend, "torch_ops": torch_ops})
    wrapped.eval()
    return rollout_of(wrapped, workload, rank=rank)


def rollout_of(engine: Any, workload: Workload, *, rank: int = 0) -> Provider:
    """The same on an engine that is wrapped already."""
    from tritonhybrid import SamplingParams

    prompts = workload.prompts(rank)

    def params(length: int) -> Any:
        return SamplingParams(max_new_tokens=length, temperature=0.0, n=workload.n, ignore_eos=True)

    sampling: Any = [params(length) for length in workload.new_tokens]
    if not workload.is_ragged:
        sampling = sampling[0]

    def run() -> Tokens:
        return [each.token_ids for each in engine.rollout(prompts, sampling).completions]

    def facts() -> dict[str, str]:
        stats = engine.stats
        return {
            "attention": "paged, ours",
            "compile": "none",
            "graph": f"own CUDA graphs, {stats.graph_hits} replays"
            if stats.graph_hits
            else f"none: {stats.graph_reason}",
            "path": stats.path,
            "layer_paths": str(stats.layer_paths),
            "backend": stats.backend,
            "sampler": stats.sampler,
            "strategy": stats.strategy,
            "gather_s": f"{stats.gather_s:.4f}",
            "bind_s": f"{stats.bind_s:.4f}",
            "prefill_s": f"{stats.prefill_s:.4f}",
            "decode_s": f"{stats.decode_s:.4f}",
            "notes": "; ".join(stats.notes),
        }

    return Provider(name="tritonhybrid", run=run, facts=facts)
