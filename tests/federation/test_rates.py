"""Under a learning rate that falls, old updates count by the rate of now: MIFA by its rule, FedStale without a bias."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedlora.algebra.deltas import add, scale
from fedlora.algebra.flat import Layout
from fedlora.algebra.recurrence import RunningRecurrence
from fedlora.config.method import FedSvd, Stale
from fedlora.config.schema import IndependentCohort
from fedlora.federation.absorb import forget
from fedlora.federation.gather import gather
from fedlora.federation.remembered import Remembered
from fedlora.federation.work import work
from fedlora.methods import build
from fedlora.values import Own, Recurrence, RoundPlan

ROUNDS = 8
WEIGHT = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
PROBABILITY = {"a": 0.15, "b": 0.5, "c": 0.8, "d": 1.0}
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def falling(lab, **changes):
    optimizer = {"name": "sgd", "lr": 0.4, "decay": "linear"}
    return lab.federation(**{"rounds": ROUNDS, "optimizer": optimizer, **changes})


def method_of(lab, **stale):
    return build(FedSvd(name="fedsvd", stale=Stale(**stale)), lab.lora("kaiming"), 7)


def mifa(lab):
    return method_of(lab, rule="mifa", beta=1.0)


def planned(number, cohort):
    return RoundPlan(run="run", round=number, cohort=cohort, probability=PROBABILITY, weight=WEIGHT)


class Server:
    """Rounds through the real gather and absorb, beside what MIFA's rule says of dense matrices."""

    def __init__(self, lab, federation, lr=1.0):
        self.lab, self.federation, self.lr, self.method = lab, federation, lr, mifa(lab)
        self.state, self.memory = lab.start(self.method), Remembered()
        self.draw = torch.Generator().manual_seed(5)
        self.latest = {}
        self.late = None

    def rate(self, number):
        return work(number, self.federation).learning_rate

    def round(self, cohort, keeps_back=None):
        """All of the cohort answer, but for one whose update comes in the next round."""
        number = self.state.round + 1
        plan = planned(number, cohort)
        updates = {
            client: self.lab.update(client, plan, self.lab.delta(self.state, self.draw)) for client in cohort
        }
        dense = {client: self.lab.dense(update.delta, self.state) for client, update in updates.items()}
        replies = [update for client, update in updates.items() if client != keeps_back]
        answers = {client: (number, dense[client]) for client in cohort if client != keeps_back}
        if self.late is not None:
            update, known = self.late
            replies, answers = [*replies, update], {**answers, update.client: known}
        self.late = (updates[keeps_back], (number, dense[keeps_back])) if keeps_back else None
        self.latest |= answers  # participants replace first
        before = self.lab.products(self.state)
        self.state = self.lab.absorb(
            self.state, plan, replies, memory=self.memory, method=self.method, federation=self.federation
        ).state
        for name, product in self.lab.products(self.state).items():
            step = sum(
                (
                    self.rate(number) * WEIGHT[client] * change[name] / self.rate(made)
                    for client, (made, change) in self.latest.items()
                ),
                start=torch.zeros_like(product),
            )
            assert_close(product, before[name] + self.lr * step, **EXACT)


@pytest.mark.parametrize("participation", ["normalised", "importance"])
def test_mifa_steps_by_everybodys_newest_update_at_the_rate_of_the_round(lab, participation):
    """Bases turn every round, one client is never heard, some rounds nobody is, and one update is late."""
    server = Server(lab, falling(lab, participation=participation))
    server.round(("a", "b"))
    server.round(("b", "d"), keeps_back="d")
    server.round(("a",))
    server.round(())
    server.round(("a", "b", "d"))
    server.round(())
    assert server.state.remembered == {"a": 5, "b": 5, "d": 5} and server.state.adapters.basis == 6


def test_a_round_without_answers_is_a_round_as_any_for_the_servers_optimiser(lab):
    server = Server(lab, falling(lab, server={"name": "sgd", "lr": 0.25}), lr=0.25)
    server.round(("a", "c"))
    server.round(())


def test_where_everybody_answers_mifa_is_fedavg(lab):
    federation, everybody = falling(lab), tuple(WEIGHT)
    one, other = lab.start(mifa(lab)), lab.start(lab.method(init="kaiming"))
    draw, memory = torch.Generator().manual_seed(1), Remembered()
    for number in range(1, 4):
        plan = planned(number, everybody)
        replies = [lab.update(client, plan, lab.delta(one, draw)) for client in everybody]
        one = lab.absorb(one, plan, replies, memory=memory, method=mifa(lab), federation=federation).state
        plain = lab.method(init="kaiming")
        other = lab.absorb(other, plan, replies, method=plain, federation=federation).state
    for name, product in lab.products(other).items():
        assert_close(lab.products(one)[name], product, **EXACT)


NUMBER, MADE = 6, {"a": 1, "b": 3, "d": 5}
OWN = {"a": 0.2, "b": 0.9, "d": 0.5}


def in_round_five(lab, method, draw):
    """Updates of three clients are remembered, and their sum at the first round's rate."""
    federation = falling(lab)
    state = lab.start(method)
    held = {client: (at, lab.delta(state, draw, basis=-1)) for client, at in MADE.items()}
    adaptive = method.mixing.adaptive
    own = {client: Own(beta=beta) for client, beta in OWN.items() if adaptive and adaptive.by_client}
    memory = scale(state.memory, 0.0)
    for client, (at, delta) in held.items():
        of_then = work(1, federation).learning_rate / work(at, federation).learning_rate
        memory = add(memory, delta, WEIGHT[client] * of_then * (own[client].beta if own else 1.0))
    known = Recurrence(product=3.0, energy=8.0)
    state = replace(state, round=NUMBER - 1, memory=memory, remembered=dict(MADE), recurrence=known, own=own)
    return state, held, federation


def step_of(lab, state, held, method, federation, updates):
    plan = planned(NUMBER, tuple(updates))
    replies = [lab.update(client, plan, delta) for client, delta in updates.items()]
    return gather(state, plan, replies, memory=Remembered(held), method=method, federation=federation)


@pytest.mark.parametrize("beta", [0.3, 1.0, "adaptive", "adaptive-by-client"])
def test_fedstale_at_the_rate_of_the_round_is_unbiased_over_all_cohorts(lab, beta):
    method, draw = method_of(lab, beta=beta, scale_by_rate=True), torch.Generator().manual_seed(2)
    state, held, federation = in_round_five(lab, method, draw)
    federation = federation.model_copy(update={"participation": "importance"})
    deltas = {client: lab.delta(state, draw) for client in WEIGHT}
    mean = scale(deltas["a"], 0.0)
    for here in itertools.product((False, True), repeat=len(WEIGHT)):
        cohort = [client for client, asked in zip(WEIGHT, here, strict=True) if asked]
        chance = 1.0
        for client, p in PROBABILITY.items():
            chance *= p if client in cohort else 1 - p
        if chance:
            updates = {client: deltas[client] for client in cohort}
            mean = add(mean, step_of(lab, state, held, method, federation, updates).step, chance)
    wanted = scale(deltas["a"], 0.0)
    for client, delta in deltas.items():
        wanted = add(wanted, delta, WEIGHT[client])
    for found, right in zip(_tensors(mean), _tensors(wanted), strict=True):
        assert_close(found, right, **EXACT)


def test_what_is_remembered_counts_times_the_rate_now_over_the_rate_then(lab):
    """Nobody answers: the step is beta times the sum of weight * update * rate now / rate then, in the frame."""
    steps = {}
    for by_rate in (False, True):
        method, draw = method_of(lab, beta=0.5, scale_by_rate=by_rate), torch.Generator().manual_seed(3)
        state, held, federation = in_round_five(lab, method, draw)
        steps[by_rate] = step_of(lab, state, held, method, federation, {}).step.head["weight"]
    right = sum(
        0.5 * WEIGHT[client] * delta.head["weight"] * (ROUNDS - NUMBER + 1) / (ROUNDS - at + 1)
        for client, (at, delta) in held.items()
    )
    assert_close(steps[True], right, **EXACT)
    assert float((steps[False] - right).norm()) > 0.1 * float(right.norm())


def test_an_adaptive_beta_compares_updates_at_one_rate(lab):
    """A client that sends the same direction at every rate is as predictable as one whose rate stays."""
    method, draw = method_of(lab, beta="adaptive", scale_by_rate=True), torch.Generator().manual_seed(4)
    state, held, federation = in_round_five(lab, method, draw)
    federation = federation.model_copy(update={"participation": "importance"})
    now = work(NUMBER, federation).learning_rate
    same = {
        client: scale(delta, now / work(at, federation).learning_rate) for client, (at, delta) in held.items()
    }
    state = replace(state, recurrence=Recurrence(), gauges=(replace(state.gauges[0], sites=_eyes(lab)),))
    coins = federation.model_copy(update={"cohort": IndependentCohort(probability=0.5)})
    updates = {client: replace(delta, basis=0) for client, delta in same.items()}
    known = step_of(lab, state, held, method, coins, updates).recurrence
    assert known.product == pytest.approx(known.energy, rel=1e-12)
    one_rate = RunningRecurrence(Layout.of(state.memory), centred=False)
    for client, delta in same.items():
        one_rate.add(delta, delta, (WEIGHT[client] / PROBABILITY[client]) ** 2)
    assert known.energy == pytest.approx(one_rate.sums().energy, rel=1e-12)


def test_a_client_that_leaves_takes_its_part_of_the_sum_along(lab):
    method, draw = method_of(lab, beta=0.5, scale_by_rate=True), torch.Generator().manual_seed(6)
    state, held, federation = in_round_five(lab, method, draw)
    counted = work(1, federation).learning_rate / work(MADE["b"], federation).learning_rate
    left = forget(state, "b", held["b"][1], WEIGHT["b"], counted=counted)
    wanted = scale(state.memory, 0.0)
    for client in ("a", "d"):
        at, delta = held[client]
        of_then = work(1, federation).learning_rate / work(at, federation).learning_rate
        wanted = add(wanted, delta, WEIGHT[client] / (1 - WEIGHT["b"]) * of_then)
    for found, right in zip(_tensors(left.memory), _tensors(wanted), strict=True):
        assert_close(found, right, **EXACT)


def _tensors(delta):
    return [*delta.sites.values(), *delta.head.values()]


def _eyes(lab):
    return {site: torch.eye(3, dtype=torch.float64) for site in lab.shapes}
