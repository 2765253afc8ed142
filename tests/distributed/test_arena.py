"""Where weights lie in ZeRO-3's arena, and in the flat buffers of ZeRO 1 and 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import (
    hf_greedy,
    hybrid_engine,
    micro_step,
    plain_copy,
    plain_engine,
    ragged_prompts,
    tokens,
)
from torch import nn

from tritonhybrid import SamplingParams
from tritonhybrid.containers.joined import joined, neighbours
from tritonhybrid.containers.parts import find_parts
from tritonhybrid.runner import Runner
from tritonhybrid.weights.arena import Arena

GREEDY = SamplingParams(max_new_tokens=4, temperature=0.0)
PROMPTS = ragged_prompts(2)


def parameters_of(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_groups_are_contiguous_and_aligned_whatever_the_order_of_registration():
    up, norm, v, k_bias, gate, q, v_bias, k, q_bias = parameters = parameters_of(
        (7, 5), (5,), (3, 5), (3,), (7, 5), (9, 5), (3,), (3, 5), (9,)
    )
    groups = [[q, k, v], [q_bias, k_bias, v_bias], [gate, up]]
    arena = Arena(parameters, groups)
    arena.store(parameters)
    for group in groups:
        view = joined(*(arena.view(parameter) for parameter in group))
        assert torch.equal(view, torch.cat(group).detach())
        assert arena.view(group[0]).storage_offset() * 4 % 256 == 0
    assert arena.view(norm).storage_offset() * 4 % 256 == 0
    for parameter in parameters:
        assert torch.equal(arena.view(parameter), parameter)
    # Nothing lies in another's place, and only boundaries cost memory.
    assert arena.num_bytes == sum(
        -(-sum(p.numel() for p in block) // 64) * 256 for block in (*groups, [norm])
    )
    arena.view(norm).fill_(0)
    assert torch.equal(joined(*(arena.view(p) for p in groups[0])), torch.cat([q, k, v]).detach())


def test_groups_that_have_no_one_place_are_laid_out_parameter_by_parameter():
    a, b, c, d = parameters_of((2, 3), (2, 3), (2, 3), (2, 3))
    half = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    arena = Arena([a, b, c, d, half], [[a, half], [b, c], [c, d], [d, d]])
    arena.store([a, b, c, d, half])
    for parameter in (a, b, c, d, half):
        assert torch.equal(arena.view(parameter), parameter)
    assert joined(arena.view(b), arena.view(c)) is not None
    assert joined(arena.view(c), arena.view(d)) is None
    for parameter in (a, b, d, half):
        view = arena.view(parameter)
        assert view.storage_offset() * view.element_size() % 256 == 0


def test_an_arena_holds_what_it_was_laid_out_for():
    a, b, c = parameters = parameters_of((2, 3), (2, 3), (2, 3))
    arena = Arena(parameters, [[b, a]])
    assert arena.holds(parameters, [[b, a]])
    # Who asks for no order is content with any.
    assert arena.holds(parameters)
    assert not arena.holds(parameters, [[a, b]])
    assert not arena.holds([a, b], [[b, a]])
    assert not arena.holds([a, c, b], [[b, a]])
    assert not Arena(parameters).holds(parameters, [[b, a]])


def joined_in_a_step(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """What of each layer is one matrix, and the right one, inside a rollout's steps."""
    engine = hybrid_engine(stage, dtype=dtype, attention_bias=True)
    groups = neighbours(find_parts(engine.module).layers)
    micro_step(engine, 0)
    expected = hf_greedy(plain_copy(engine), PROMPTS, 4)
    original = Runner.execute
    seen = []

    def execute(self: Runner, step: Any) -> Any:
        for group in groups:
            view = joined(*group)
            seen.append(view is not None and torch.equal(view, torch.cat(group)))
        return original(self, step)

    Runner.execute = execute
    try:
        out = engine.rollout(PROMPTS, GREEDY)
        addresses = [engine.__dict__["_tritonhybrid"].generation.source._arena]
        engine.rollout(PROMPTS, GREEDY)
        addresses.append(engine.__dict__["_tritonhybrid"].generation.source._arena)
    finally:
        Runner.execute = original
    return {
        "seen": seen,
        "num_groups": len(groups),
        "between": [joined(*group) is not None for group in groups],
        "tokens": tokens(out),
        "hf_tokens": expected,
        "is_kept": addresses[0] is addresses[1],
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_3_lays_q_k_v_and_gate_up_side_by_side(ranks, world_size, dtype):
    for result in ranks(world_size).run(joined_in_a_step, 3, dtype):
        # Weights and biases of q, k, v, and weights of gate, up, in three layers.
        assert result["num_groups"] == 9
        assert len(result["seen"]) == 2 * 4 * 9
        assert all(result["seen"])
        assert not any(result["between"])
        assert result["is_kept"]
        if dtype is torch.float32:
            assert result["tokens"] == result["hf_tokens"]


def joined_between_calls(stage: int) -> list[bool]:
    engine = plain_engine(stage, dtype=torch.bfloat16)
    groups = neighbours(find_parts(engine.module).layers)
    before = [joined(*group) for group in groups]
    micro_step(engine, 0)
    # The optimizer writes where the views look.
    for view, group in zip(before, groups, strict=True):
        if view is not None:
            assert torch.equal(view, torch.cat([p.detach() for p in group]))
    return [view is not None for view in before]


@pytest.mark.parametrize(("stage", "is_joined"), [(0, False), (1, True), (2, True)])
def test_neighbours_in_deepspeeds_flat_buffers_are_noticed(ranks, stage, is_joined):
    assert ranks(1).run(joined_between_calls, stage) == [[is_joined] * 6]
