"""Random rounds of generating, failing and training on two ranks; ``nox -s soak`` plays 1,000.

``TRITONHYBRID_ROUNDS=N`` plays N of them, ``FIRST:LAST`` those from FIRST up to LAST: a round
that failed is played again alone by ``I:I+1``, or, with all that its engine went through before,
from the last multiple of ten. ``TRITONHYBRID_ROUNDS_SEED`` draws others.
"""

from __future__ import annotations

import os
from pprint import pformat
from typing import Any

import pytest
from ranks import RankError
from round_player import begin, play
from rounds import BROKEN, REFUSED, SPELL, Round, draw_round, draw_settings

SEED = int(os.environ.get("TRITONHYBRID_ROUNDS_SEED", "0"))


def rounds_asked_for() -> range:
    first, _, last = os.environ.get("TRITONHYBRID_ROUNDS", "30").rpartition(":")
    return range(int(first or 0), int(last))


def spells() -> list[range]:
    """Runs of rounds with one engine each."""
    asked = rounds_asked_for()
    firsts = range(asked.start // SPELL * SPELL, asked.stop, SPELL)
    return [range(max(f, asked.start), min(f + SPELL, asked.stop)) for f in firsts]


@pytest.mark.parametrize("spell", spells(), ids=lambda s: f"{s.start}:{s.stop}")
def test_whatever_ranks_do_they_stay_right_in_step_and_trainable(ranks, spell):
    pool = ranks(2)
    number = spell.start // SPELL
    stage, config = draw_settings(SEED, number)
    pool.run(begin, SEED, number)
    for index in spell:
        plan = draw_round(SEED, index)
        try:
            found = problems(stage, plan, pool.run(play, index))
        except RankError as error:
            found = [str(error)]
        story = pformat(plan, width=100, compact=True)
        assert found == [], "\n".join([f"ZeRO-{stage}, {config}", story, *found])


def problems(stage: int, plan: Round, results: list[dict[str, Any]]) -> list[str]:
    """What should not have been, in words."""
    found = [f"rank {rank}: {p}" for rank, r in enumerate(results) for p in r["problems"]]
    fault = plan.fault
    if fault is None:
        return found + [f"rank {i}: {r['error']}" for i, r in enumerate(results) if r["error"]]
    bad, good = results[fault.rank], results[1 - fault.rank]
    expected = (REFUSED | BROKEN)[fault.kind]
    if bad["error"] and not bad["error"].startswith(expected):
        found.append(f"rank {fault.rank}: {bad['error']}")
    if fault.kind in (*REFUSED, "all masked") and not bad["error"]:
        found.append(f"rank {fault.rank} refused nothing")
    if bad["has_fired"] and fault.kind != "op gives nan" and not bad["error"]:
        found.append(f"rank {fault.rank} raised nothing")
    # Resident ranks owe each other nothing; others hear of each failure, and of whose it is.
    is_told = stage == 3 and bool(bad["error"])
    heard = f"RankFailureError: rank {fault.rank} failed during a collective rollout: {expected}"
    if is_told != bool(good["error"]) or not good["error"].startswith(heard * is_told):
        found.append(f"rank {1 - fault.rank}: {good['error'] or 'heard of nothing'}")
    return found
