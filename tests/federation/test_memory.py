"""The canonical memory against a reference that keeps every client's update as a dense matrix."""

from dataclasses import replace

import pytest
import torch

from fedlora.federation.absorb import forget
from fedlora.federation.plan import plan
from fedlora.federation.remembered import Remembered
from fedlora.values import Gauges, Member

ROUNDS = 50
JOINS = {9: "client-7", 21: "client-8", 34: "client-2"}
"""Round before which a client joins; client-2 comes back after it had left."""
LEAVES = {14: "client-2", 30: "client-0", 41: "client-8"}


class Reference:
    """FedStale as in the paper, over dense (d_out, d_in) matrices: no basis, no frame, no running sum."""

    def __init__(self, beta, participation, products):
        self.beta, self.participation = beta, participation
        self.model = {name: tensor.clone() for name, tensor in products.items()}
        self.memory = {}

    def step(self, plan, updates):
        total = sum(plan.weight[client] for client in updates)
        for name in self.model:
            moved = sum(
                (self.beta * plan.weight[client] * old[name] for client, old in self.memory.items()),
                torch.zeros_like(self.model[name]),
            )
            for client, new in updates.items():
                old = self.memory[client][name] if client in self.memory else 0.0
                divisor = total if self.participation == "normalised" else plan.probability[client]
                moved = moved + plan.weight[client] / divisor * (new[name] - self.beta * old)
            self.model[name] = self.model[name] + moved
        self.memory.update(updates)

    def running_sum(self, weight, name):
        return sum(
            (weight[client] * old[name] for client, old in self.memory.items()),
            torch.zeros_like(self.model[name]),
        )


class Federation:
    """The real thing beside its reference, on the same updates; counts the largest disagreement."""

    def __init__(self, lab, method, federation, beta, *, spoil=lambda state: state, faithful_roster=True):
        self.lab, self.method, self.federation, self.spoil = lab, method, federation, spoil
        self.faithful_roster = faithful_roster
        self.state = lab.start(method)
        self.reference = Reference(beta, federation.participation, lab.products(self.state))
        self.members = {member.client: member for member in lab.members(6)}
        self.memory, self.late = Remembered(), []
        self.generator = torch.Generator().manual_seed(3)
        self.worst = 0.0

    def weight(self, client):
        return self.plan().weight[client]

    def plan(self):
        members = list(self.members.values())
        return plan(self.state, members, run="run", federation=self.federation, seed=11)

    def change_roster(self, round_):
        if round_ in LEAVES:
            gone = LEAVES[round_]
            if self.faithful_roster:
                _, update = self.memory.updates.get(gone, (0, None))
                self.state = forget(self.state, gone, update, self.weight(gone))
            del self.members[gone]
            self.memory.updates.pop(gone, None)
            self.reference.memory.pop(gone, None)
        if round_ in JOINS:
            new = JOINS[round_]
            self.members[new] = Member(client=new, examples=25)
            if self.faithful_roster:
                self.state = self.lab.admit(self.state, self.weight(new))

    def round(self):
        self.change_roster(self.state.round + 1)
        planned, state = self.plan(), self.state
        answers = {client: self.lab.delta(state, self.generator) for client in planned.cohort}
        replies = [
            (self.lab.update(client, planned, delta), self.lab.dense(delta, state))
            for client, delta in answers.items()
        ]
        # Every third round its first client answers late: with the next round's replies, in an older basis.
        here, later = (replies[1:], replies[:1]) if planned.round % 3 == 0 else (replies, [])
        arrived, self.late = [*here, *self.late], later
        absorbed = self.lab.absorb(
            self.spoil(state),
            planned,
            [reply for reply, _ in arrived],
            memory=self.memory,
            method=self.method,
            federation=self.federation,
        )
        counted = {
            reply.client: dense for reply, dense in reversed(arrived) if reply.client in planned.weight
        }
        assert set(counted) == set(absorbed.report.answered)
        self.reference.step(planned, counted)
        self.state = absorbed.state
        self.compare(planned.weight)

    def compare(self, weight):
        memory = self.lab.dense_in_frame(self.state.memory, self.state)
        for name, product in self.lab.products(self.state).items():
            model = self.reference.model[name]
            scale = 1 + float(model.norm())
            self.worst = max(
                self.worst,
                float((product - model).norm()) / scale,
                float((memory[name] - self.reference.running_sum(weight, name)).norm()) / scale,
            )


CASES = {
    "fedstale, refactorised every round": ({"beta": 0.5}, {"cohort": 3}),
    "fedvarp, by importance and examples": (
        {"beta": 1.0, "init": "kaiming"},
        {"cohort": {"probability": 0.4}, "participation": "importance", "weighting": "examples"},
    ),
    "every third round, kaiming": (
        {"beta": 0.7, "init": "kaiming", "refactor_every": 3},
        {"cohort": {"probability": 0.5}, "weighting": "examples"},
    ),
    "frozen orthonormal": ({"beta": 0.3, "name": "ffa"}, {"cohort": 2, "participation": "importance"}),
    "frozen kaiming": ({"beta": 0.3, "name": "fedavg"}, {"cohort": 2}),
}


def ran(lab, case, rounds=ROUNDS, **more):
    method, federation = CASES[case]
    pair = Federation(lab, lab.method(**method), lab.federation(**federation), method["beta"], **more)
    for _ in range(rounds):
        pair.round()
    return pair


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_memory_equals_dense_matrices_over_fifty_rounds(lab, case):
    pair = ran(lab, case)
    assert pair.state.round == ROUNDS
    # float64: about 50 rounds of sums, each off by a few eps, against 1e4 eps.
    assert pair.worst < 1e-11
    assert all(reply in pair.state.remembered for reply in pair.memory.updates)


def shifted_gauge(state):
    """Every gauge is that of the basis before: what forgetting one refactorisation would look like."""
    if len(state.gauges) < 2:
        return state
    pairs = zip(state.gauges, (state.gauges[0], *state.gauges), strict=False)
    return replace(
        state, gauges=tuple(Gauges(basis=gauges.basis, sites=before.sites) for gauges, before in pairs)
    )


def without_memory(state):
    sites = {site: torch.zeros_like(tensor) for site, tensor in state.memory.sites.items()}
    return replace(state, memory=replace(state.memory, sites=sites))


@pytest.mark.parametrize("spoil", [shifted_gauge, without_memory])
def test_a_wrong_gauge_or_memory_does_not_go_unseen(lab, spoil):
    assert ran(lab, "fedstale, refactorised every round", rounds=8, spoil=spoil).worst > 1e-3


def test_a_roster_that_changes_behind_the_memorys_back_does_not_go_unseen(lab):
    assert ran(lab, "fedstale, refactorised every round", rounds=16, faithful_roster=False).worst > 1e-3


def test_forgetting_leaves_the_memory_as_if_the_client_had_never_been(lab):
    """The others' updates, with and without one client between them, end in the same memory."""
    method, federation = lab.method("ffa", beta=0.5), lab.federation(cohort={"probability": 1.0})
    generator = torch.Generator().manual_seed(5)
    state = lab.start(method)
    deltas = {f"client-{index}": lab.delta(state, generator) for index in range(3)}

    def after_a_round(members):
        planned = plan(state, members, run="run", federation=federation, seed=7)
        replies = [lab.update(client, planned, deltas[client]) for client in planned.cohort]
        memory = Remembered()
        after = lab.absorb(state, planned, replies, memory=memory, method=method, federation=federation)
        return after, memory.updates

    (everyone, kept), (others, _) = after_a_round(lab.members(3)), after_a_round(lab.members(2))
    left = forget(everyone.state, "client-2", kept["client-2"][1], 1 / 3)
    for site in lab.shapes:
        torch.testing.assert_close(left.memory.sites[site], others.state.memory.sites[site])
        assert torch.equal(left.adapters.sites[site].b, everyone.state.adapters.sites[site].b)
    assert left.remembered == others.state.remembered
    back = lab.admit(left, 1 / 3)
    planned = plan(back, lab.members(3), run="run", federation=federation, seed=7)
    again = lab.absorb(
        back,
        planned,
        [lab.update("client-2", planned, deltas["client-2"])],
        method=method,
        federation=federation,
    )
    for site in lab.shapes:
        torch.testing.assert_close(again.state.memory.sites[site], everyone.state.memory.sites[site])


def test_the_last_member_leaves_nothing(lab):
    method, federation = lab.method(beta=0.5), lab.federation(cohort=1)
    state = lab.start(method)
    planned = plan(state, lab.members(1), run="run", federation=federation, seed=7)
    delta = lab.delta(state, torch.Generator().manual_seed(0))
    memory = Remembered()
    absorbed = lab.absorb(
        state,
        planned,
        [lab.update("client-0", planned, delta)],
        memory=memory,
        method=method,
        federation=federation,
    )
    left = forget(absorbed.state, "client-0", memory.updates["client-0"][1], 1.0)
    assert left.remembered == {}
    assert not any(bool(tensor.any()) for tensor in left.memory.sites.values())
