"""Sampling at fixed addresses gives each row the bits that sampling by rows gives it."""

from dataclasses import replace

import pytest
import torch

from tritonhybrid import SamplingParams
from tritonhybrid.replay_sampler import DrawPlan, ReplaySampler, RowSettings
from tritonhybrid.sampler import HeadCalls, Sampler
from tritonhybrid.sequence import Sequence
from tritonhybrid_kernels.ops import select_ops

VOCAB, WIDTH, ROWS = 301, 24, 16
CPU = torch.device("cpu")
WAYS = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(),
    "warm": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=5),
    "wide_top_k": SamplingParams(top_k=10_000, temperature=1.3),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.05),
    "all": SamplingParams(temperature=0.8, top_k=50, top_p=0.95, min_p=0.001),
    "ends_later": SamplingParams(temperature=0, min_new_tokens=1),
}
# The torch paths; as "triton" the head samples in its own kernel where a row lets it.
OPS = {"torch": select_ops("torch"), "triton": replace(select_ops("torch"), backend="triton")}


def rows_of(names):
    rows = [
        Sequence(
            prompt_index=i,
            sample_index=0,
            uid=1000 + i,
            key=77 * i - 5,
            prompt=(1, 2, 3),
            prompt_key=i,
            params=WAYS[name],
            end_ids=frozenset({9}),
        )
        for i, name in enumerate(names)
    ]
    for row in rows:
        row.append(4, 0.0, 0.0)
    return rows


def head():
    torch.manual_seed(1)
    weight = torch.randn(VOCAB, WIDTH)
    logits = lambda hidden: torch.nn.functional.linear(hidden, weight)  # noqa: E731
    return HeadCalls(logits=logits, weight=weight, bias=None)


def both(ops, names, num_rows=ROWS):
    rows = rows_of(names)
    torch.manual_seed(2)
    hidden = torch.randn(num_rows, WIDTH)
    positions = torch.full((num_rows,), 4)
    # By rows, over as many rows: another number of them would be rounded otherwise.
    padding = rows_of(["greedy"] * (num_rows - len(rows)))
    by_rows = Sampler(ops, head(), CPU)
    by_rows.prepare([*rows, *padding])
    expected = by_rows.draw(hidden, positions)
    settings = RowSettings(num_rows, CPU)
    used: set[str] = set()
    sampler = ReplaySampler(ops, head(), settings, used)
    plan = sampler.prepare(rows, num_rows)
    drawn = sampler.draw(hidden, positions, plan)
    return expected, drawn, plan, used, by_rows.used


@pytest.mark.parametrize("backend", OPS)
@pytest.mark.parametrize(
    "names",
    [[name] * 5 for name in WAYS] + [list(WAYS), ["greedy", "warm"], ["top_p", "plain", "top_k"]],
    ids=lambda names: "+".join(sorted(set(names))),
)
def test_a_row_gets_the_bits_it_gets_by_rows(backend, names):
    expected, drawn, *_ = both(OPS[backend], names)
    count = len(names)
    assert torch.equal(drawn.tokens[:count], expected.tokens[:count])
    assert torch.equal(drawn.logprobs[:count], expected.logprobs[:count])
    assert torch.equal(drawn.raw_logprobs[:count], expected.raw_logprobs[:count])
    # Padding, too, is drawn from numbers.
    assert drawn.logprobs.isfinite().all() and drawn.raw_logprobs.isfinite().all()


def test_the_plan_names_what_any_row_needs_and_the_samplers_used():
    *_, plan, used, by_rows = both(OPS["triton"], ["greedy", "plain"])
    assert plan == DrawPlan(is_fused=True)
    assert used == by_rows == {"argmax", "gumbel_max"}
    *_, plan, used, _ = both(OPS["triton"], ["greedy", "all", "top_k"])
    assert plan == DrawPlan(
        is_fused=True,
        is_processed=True,
        is_ruled=True,
        is_scaled=True,
        num_candidates=64,
        has_top_p=True,
        has_min_p=True,
    )
    assert used == {"argmax", "inverse_cdf"}
    *_, plan, used, _ = both(OPS["torch"], ["greedy", "plain"])
    assert plan == DrawPlan(is_processed=True)
    assert used == {"argmax", "inverse_cdf"}


def test_settings_keep_their_addresses_and_change_with_the_rows():
    settings = RowSettings(4, CPU)
    sampler = ReplaySampler(OPS["torch"], head(), settings, set())
    hidden, positions = torch.randn(4, WIDTH), torch.full((4,), 4)
    before = settings.addresses
    first = rows_of(["top_k", "greedy"])
    wide = sampler.draw(hidden, positions, sampler.prepare(first, 4)).tokens
    assert sampler.prepare(first, 4) is sampler.prepare(list(first), 4)
    other = sampler.draw(hidden, positions, sampler.prepare(rows_of(["greedy"] * 3), 4)).tokens
    assert settings.addresses == before
    logits = head().logits(hidden)
    assert torch.equal(other, logits.argmax(1))
    assert wide[1] == logits[1].argmax()
    assert wide[0] in logits[0].topk(5).indices
