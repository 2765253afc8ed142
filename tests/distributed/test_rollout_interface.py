"""DeepSpeed's rollout interface on ZeRO-3 ranks: sampled, n > 1, ragged, ending apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.rollout import ResponseTokenBatch, RolloutRequest, SamplingConfig
from models import VOCAB, hf_logprobs, hybrid_engine, micro_step, plain_copy, ragged_prompts

from tritonhybrid import TritonRollout

PAD = 0
# A quarter of the vocabulary ends a response.
ENDS = list(range(3, 28))
N = 3


def left_padded(prompts: list[list[int]], width: int) -> RolloutRequest:
    """Prompts at the right edge of ``width`` columns."""
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return RolloutRequest(ids, mask)


def roll_out_between_steps(
    counts: tuple[int, int], budgets: tuple[int, int], continuous_batch_size: int | None
) -> list[dict[str, Any]]:
    """Two rollouts with a training step between, the ranks with prompts and ends of their own."""
    rank = torch.distributed.get_rank()
    engine = hybrid_engine(3)
    rollout = TritonRollout(engine, SimpleNamespace(pad_token_id=PAD, eos_token_id=ENDS))
    rounds = []
    for index in range(2):
        prompts = ragged_prompts(counts[rank], seed=10 * index + rank)
        request = left_padded(prompts, 30 + rank)
        sampling = SamplingConfig(
            max_new_tokens=budgets[rank],
            temperature=0.8,
            n_samples_per_prompt=N,
            continuous_batch_size=continuous_batch_size,
        )
        batch = rollout.generate(request, sampling)
        exact = plain_copy(engine).double()
        truth = []
        for row in range(len(prompts) * N):
            length = int(batch.attention_mask[row, 30 + rank :].sum())
            response = batch.input_ids[row, 30 + rank :][:length].tolist()
            truth.append(hf_logprobs(exact, prompts[row // N], response))
        targets = ResponseTokenBatch.from_rollout(batch)
        rounds.append(
            {
                "prompts": request,
                "ids": batch.input_ids,
                "mask": batch.attention_mask,
                "starts": batch.response_start_idx.tolist(),
                "raw": batch.raw_logprobs,
                "sampled": batch.logprobs,
                "truth": truth,
                "targets": targets.target_ids[targets.response_mask].tolist(),
                "steps": engine.stats.num_decode_steps,
                "loss": micro_step(engine, index),
            }
        )
    return rounds


@pytest.mark.parametrize("continuous_batch_size", [None, 2])
@pytest.mark.parametrize(
    ("counts", "budgets"), [((3, 4), (9, 17)), ((3, 0), (9, 9))], ids=["both", "one rank empty"]
)
def test_ranks_that_end_apart_give_deepspeeds_batches_with_the_training_logprobs(
    ranks, counts, budgets, continuous_batch_size
):
    answers = ranks(2).run(roll_out_between_steps, counts, budgets, continuous_batch_size)
    for rank, rounds in enumerate(answers):
        width, rows = 30 + rank, counts[rank] * N
        lengths = []
        for result in rounds:
            ids, mask = result["ids"], result["mask"]
            assert ids.shape[0] == rows
            assert result["starts"] == [width] * rows
            given = result["prompts"]
            assert torch.equal(ids[:, :width], given.prompt_ids.repeat_interleave(N, 0))
            assert torch.equal(mask[:, :width], given.prompt_attention_mask.repeat_interleave(N, 0))
            expected_targets = []
            for row in range(rows):
                response = ids[row, width:].tolist()
                end = int(mask[row, width:].sum())
                lengths.append(end)
                assert mask[row, width:].tolist() == [1] * end + [0] * (len(response) - end)
                assert response[end:] == [PAD] * (len(response) - end)
                assert not set(response[: end - 1]) & set(ENDS)
                assert response[end - 1] in ENDS or end == budgets[rank]
                ours = result["raw"][row, width : width + end].double()
                assert (ours - result["truth"][row]).abs().max() < 2e-4
                expected_targets += response[:end]
            assert result["targets"] == expected_targets
            outside = mask[:, width:] == 0
            for name in ("raw", "sampled"):
                assert not result[name][:, :width].any()
                assert not result[name][:, width:][outside].any()
            if rows:
                assert max(lengths) <= budgets[rank]
                # The samples of a group differ, or their advantage would be nought.
                assert len({tuple(row) for row in ids[:N].tolist()}) > 1
        if rows:
            assert min(lengths) < max(lengths), "EOS ends rows early, and apart"
    # No rank waited for another's steps.
    assert answers[0][0]["steps"] != answers[1][0]["steps"]
    assert answers[0][0]["loss"] != answers[0][1]["loss"]


def disagree_on_a_prompt() -> str:
    """The second rank's prompts hold an empty one; returns what each rank is told."""
    rank = torch.distributed.get_rank()
    engine = hybrid_engine(3)
    rollout = TritonRollout(engine, SimpleNamespace(pad_token_id=PAD, eos_token_id=None))
    request = left_padded([[5, 6], [7]], 4)
    if rank == 1:
        request.prompt_attention_mask[1] = 0
    sampling = SamplingConfig(max_new_tokens=3, continuous_batch_size=1)
    told = ""
    try:
        rollout.generate(request, sampling)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    after = rollout.generate(left_padded([[5, 6], [7]], 4), sampling)
    assert after.input_ids.max() < VOCAB
    return told


def test_a_ranks_refused_prompt_is_every_ranks_error_and_the_next_call_serves(ranks):
    others, own = ranks(2).run(disagree_on_a_prompt)
    assert own.startswith("ConfigError: Prompt 1 is empty")
    assert others.startswith("RankFailureError: rank 1 failed")
