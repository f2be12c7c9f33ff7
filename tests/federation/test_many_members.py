"""What a round costs the server does not grow with the number of members, but for one array of numbers."""

import json
import tracemalloc
from dataclasses import replace

import pytest
import torch

from fedlora.federation.absorb import start
from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.plan import Roll, plan
from fedlora.federation.store import Store
from fedlora.seeds import seed_for
from fedlora.values import Member, Origin
from tests.federation.answering import Answering

COHORT, ROUNDS = 10, 4
FEW, MANY = 100, 20_000
TICKET_BYTES = 8
"""A number of each member is drawn and looked through; the round's only array that grows."""


def members(count):
    return [Member(client=f"client-{number:06d}", examples=1 + number % 7) for number in range(count)]


def cost_of_a_round(lab, directory, count, weighting):
    """Most bytes in use at once in a round, beyond those in use before it."""
    federation = lab.federation(cohort=COHORT, rounds=ROUNDS, weighting=weighting)
    method = lab.method(beta=0.3)
    shapes = {"x": (6, 5)}
    state = start(shapes, head={}, lora_cfg=lab.lora(), method=method, dtype=torch.float32)
    store = Store(directory)
    store.begin(state, line_zero({}))
    played = rounds(
        state,
        origin=Origin(run="run", base_model="", code=""),
        seed=7,
        members=members(count),
        method=method,
        federation=federation,
        cohort=Answering(),
        store=store,
        score=lambda adapters: {},
    )
    for _ in range(2):
        next(played)  # what is looked through once, and caches
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        next(played)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    played.close()
    return peak


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_a_rounds_memory_is_independent_of_the_members_but_for_a_bit_more_than_the_tickets(
    lab, tmp_path, weighting
):
    small = cost_of_a_round(lab, tmp_path / "few", FEW, weighting)
    large = cost_of_a_round(lab, tmp_path / "many", MANY, weighting)
    # Tickets are copied once to find the lowest, and compared; a name and a number in a dict would take 80 or more.
    assert large - small < 1.5 * TICKET_BYTES * MANY


def test_what_a_plan_says_of_each_member_is_worked_out_when_asked(lab):
    everybody = members(MANY)
    roll = Roll.of(everybody, lab.federation(cohort=COHORT, weighting="examples"))
    one, other = (roll.plan(number, run="run", seed=7) for number in (1, 2))
    assert one.weight is other.weight and one.probability is other.probability
    total = sum(member.examples for member in everybody)
    assert all(one.weight[member.client] == member.examples / total for member in everybody[:: MANY // 50])
    assert one.probability["client-000000"] == COHORT / MANY
    assert "client-000000" in one.weight and "client-0000000" not in one.weight and "z" not in one.weight
    with pytest.raises(KeyError):
        one.weight["nobody"]


def test_the_cohort_is_that_of_the_lowest_tickets(lab):
    everybody = lab.members(300)
    state, federation = lab.start(lab.method()), lab.federation(cohort=40)
    for round_ in range(1, 30):
        clients = sorted(member.client for member in everybody)
        draw = torch.Generator().manual_seed(seed_for(7, "cohort", round_))
        tickets = torch.rand(len(clients), generator=draw, dtype=torch.float64).tolist()
        lowest = sorted(zip(tickets, clients, strict=True))[:40]
        drawn = plan(replace(state, round=round_ - 1), everybody, run="run", federation=federation, seed=7)
        assert drawn.cohort == tuple(sorted(client for _, client in lowest))


def test_the_plan_on_disk_holds_the_shares_of_those_it_asks_only(lab, tmp_path):
    (tmp_path / "run").mkdir()
    roll = Roll.of(members(MANY), lab.federation(cohort=COHORT, weighting="examples"))
    planned = roll.plan(3, run="run", seed=7)
    Store(tmp_path / "run").save_plan(planned)
    words = json.loads((tmp_path / "run" / "plans" / "round-000003.json").read_text())
    assert words == {
        "run": "run",
        "round": 3,
        "cohort": list(planned.cohort),
        "probability": dict.fromkeys(planned.cohort, COHORT / MANY),
        "weight": {client: planned.weight[client] for client in planned.cohort},
    }
