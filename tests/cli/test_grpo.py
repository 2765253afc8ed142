import math

import pytest
import torch

from tritonhybrid.demo import grpo


def batch_of(old: list[list[float]], advantages: list[float]) -> grpo.TokenBatch:
    prompts = [[1, 5, 6], [1, 7]]
    completions = [[8, 2], [9, 9, 2]]
    return grpo.pack(prompts, completions, old, advantages, pad_token_id=0)


def test_pack_marks_the_positions_that_predict_a_completion_token():
    batch = batch_of([[-1.0, -2.0], [-3.0, -4.0, -5.0]], [1.0, -1.0])
    assert batch.input_ids.tolist() == [[1, 5, 6, 8, 2], [1, 7, 9, 9, 2]]
    assert batch.completion_mask.tolist() == [
        [False, False, True, True],
        [False, True, True, True],
    ]
    assert batch.old_logprobs.tolist() == [[0, 0, -1, -2], [0, -3, -4, -5]]


def test_pack_pads_on_the_right():
    batch = grpo.pack([[4], [4, 5]], [[6], [7, 8]], [[], []], [0.0, 0.0], pad_token_id=3)
    assert batch.input_ids.tolist() == [[4, 6, 3, 3], [4, 5, 7, 8]]
    assert batch.completion_mask.sum().item() == 3


def test_advantages_are_standardised_within_each_group():
    got = grpo.group_advantages([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 4)
    std = math.sqrt(0.25 * 0.75)
    assert got[:4] == pytest.approx([0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3)
    assert got[4:] == [0.0] * 4


def test_next_token_logprobs_are_the_log_softmax_of_the_position_before():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    got = grpo.next_token_logprobs(logits, ids)
    wide = logits.double()
    for row in range(2):
        for position in range(4):
            scores = wide[row, position]
            want = scores[ids[row, position + 1]] - scores.exp().sum().log()
            assert got[row, position].item() == pytest.approx(want.item(), abs=1e-6)


def test_on_policy_the_gradient_is_the_plain_policy_gradient():
    old = [[-1.0, -2.0], [-3.0, -4.0, -5.0]]
    batch = batch_of(old, [2.0, -1.0])
    logprobs = batch.old_logprobs.clone().requires_grad_()
    loss = grpo.clipped_loss(logprobs, batch, max_new_tokens=4)
    loss.backward()
    want = -1.0 * batch.completion_mask * torch.tensor([[2.0], [-1.0]]) / (2 * 4)
    assert torch.allclose(logprobs.grad, want)
    assert loss.item() == pytest.approx(-(2 * 2.0 - 3 * 1.0) / 8)


@pytest.mark.parametrize(
    ("advantage", "ratio", "counted", "learns"),
    [
        (1.0, 1.5, 1.28, False),
        (1.0, 0.5, 0.5, True),
        (-1.0, 0.5, -0.8, False),
        (-1.0, 1.5, -1.5, True),
    ],
    ids=["good, rose far", "good, fell", "bad, fell far", "bad, rose"],
)
def test_a_ratio_past_its_clip_stops_teaching(
    advantage: float, ratio: float, counted: float, learns: bool
):
    batch = grpo.pack([[1]], [[2]], [[-1.0]], [advantage], pad_token_id=0)
    logprobs = (batch.old_logprobs + math.log(ratio)).requires_grad_()
    loss = grpo.clipped_loss(logprobs, batch, max_new_tokens=1)
    loss.backward()
    assert loss.item() == pytest.approx(-counted, abs=1e-6)
    assert bool(logprobs.grad.abs().sum() > 0) == learns


def test_imitation_loss_is_cross_entropy_of_the_completions_alone():
    torch.manual_seed(1)
    batch = batch_of([[], []], [0.0, 0.0])
    logits = torch.randn(2, 5, 10)
    got = grpo.imitation_loss(grpo.next_token_logprobs(logits, batch.input_ids), batch)
    labels = torch.where(batch.completion_mask, batch.input_ids[:, 1:], -100)
    want = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    assert got.item() == pytest.approx(want.item(), abs=1e-6)


def test_drift_adds_up_over_batches_and_ignores_padding():
    drift = grpo.Drift()
    first = batch_of([[-1.0, -2.0], [-3.0, -4.0, -5.0]], [0.0, 0.0])
    drift.add(first.old_logprobs + 0.25, first)
    second = grpo.pack([[1]], [[2]], [[-1.0]], [0.0], pad_token_id=0)
    drift.add(second.old_logprobs - 0.5, second)
    assert drift.num_tokens == 6
    assert drift.mean_abs == pytest.approx((5 * 0.25 + 0.5) / 6)
    assert drift.max_abs == pytest.approx(0.5)
    k3 = (5 * (math.exp(0.25) - 1.25) + (math.exp(-0.5) - 0.5)) / 6
    assert drift.mean_k3 == pytest.approx(k3)


def test_drift_of_nothing_is_zero():
    assert (grpo.Drift().mean_abs, grpo.Drift().mean_k3) == (0.0, 0.0)
