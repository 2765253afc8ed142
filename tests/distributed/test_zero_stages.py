"""Rollouts of every ZeRO stage, precision and world size against HF on a plain copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import (
    hf_greedy,
    hf_logprobs,
    hybrid_engine,
    micro_step,
    plain_copy,
    ragged_prompts,
    tokens,
)

from tritonhybrid import SamplingParams

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


def roll_out_between_steps(
    stage: int, dtype: torch.dtype, offloaded: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Three rollouts with a training step between each, beside HF on a copy of the weights."""
    rank = torch.distributed.get_rank()
    json: dict[str, Any] = {}
    if offloaded:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        zero |= {f"offload_{what}": {"device": "cpu"} for what in offloaded}
        # DeepSpeed's own CPU Adam would be compiled first.
        json = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    engine = hybrid_engine(stage, dtype=dtype, json=json)
    rounds = []
    for index in range(3):
        prompts = ragged_prompts(4 + rank, seed=10 * index + rank)
        output = engine.rollout(prompts, GREEDY)
        copy = plain_copy(engine)
        exact = copy.double() if dtype is torch.float32 else plain_copy(engine).double()
        ours, eager, truth = [], [], []
        for prompt, completion in zip(prompts, output.completions, strict=True):
            ours.append(torch.tensor(completion.raw_logprobs, dtype=torch.float64))
            truth.append(hf_logprobs(exact, prompt, completion.token_ids))
            eager.append(hf_logprobs(copy, prompt, completion.token_ids))
        rounds.append(
            {
                "tokens": tokens(output),
                "hf_tokens": hf_greedy(copy.to(dtype), prompts, GREEDY.max_new_tokens),
                "ours": torch.cat(ours),
                "eager": torch.cat(eager),
                "exact": torch.cat(truth),
                "stats": output.stats,
                "loss": micro_step(engine, index),
            }
        )
    return rounds


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_greedy_tokens_are_hfs_before_and_after_training_steps(ranks, stage, world_size):
    for rounds in ranks(world_size).run(roll_out_between_steps, stage, torch.float32):
        for result in rounds:
            assert result["tokens"] == result["hf_tokens"]
            assert (result["ours"] - result["exact"]).abs().max() < 2e-4
            assert result["stats"].path == "fused"
            assert result["stats"].strategy == ("pinned" if stage == 3 else "resident")
        # The weights did change between the rounds.
        assert len({result["loss"] for result in rounds}) == 3


@pytest.mark.parametrize(
    ("stage", "offloaded"), [(2, ("optimizer",)), (3, ("optimizer",)), (3, ("optimizer", "param"))]
)
def test_offloaded_engines_give_hfs_tokens(ranks, stage, offloaded):
    (rounds,) = ranks(1).run(roll_out_between_steps, stage, torch.float32, offloaded)
    for result in rounds:
        assert result["tokens"] == result["hf_tokens"]
        assert result["stats"].strategy == ("pinned" if stage == 3 else "resident")
    assert len({result["loss"] for result in rounds}) == 3


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_logprobs_are_within_twice_the_error_of_eager_hf(ranks, stage, world_size):
    results = ranks(world_size).run(roll_out_between_steps, stage, torch.bfloat16)
    rounds = [result for rounds in results for result in rounds]
    ours, eager, exact = (
        torch.cat([result[name] for result in rounds]) for name in ("ours", "eager", "exact")
    )
    assert (ours - exact).norm() <= 2 * (eager - exact).norm()
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()
    for result in rounds:
        assert result["stats"].path == "fused"
        assert result["stats"].strategy == ("pinned" if stage == 3 else "resident")
