"""The mean of a round over all participation sets is the whole federation's update, through absorb itself."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedlora.algebra.deltas import add, scale
from fedlora.federation.remembered import Remembered
from fedlora.values import Own, Recurrence, RoundPlan

PROBABILITY = {"a": 0.15, "b": 0.5, "c": 0.8, "d": 1.0}
OWN = {"a": 0.2, "b": 0.9, "d": 0.5}
WEIGHT = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}


def a_state(lab, method, generator):
    """Some rounds in: arbitrary B, updates remembered of all clients but one, and their weighted sum."""
    state = lab.start(method)
    sites = {
        site: replace(factors, b=torch.randn(factors.b.shape, generator=generator, dtype=torch.float64))
        for site, factors in state.adapters.sites.items()
    }
    state = replace(state, adapters=replace(state.adapters, sites=sites))
    remembered = {client: (0, lab.delta(state, generator, basis=-1)) for client in ("a", "b", "d")}
    adaptive = method.mixing.adaptive
    own = {client: Own(beta=beta) for client, beta in OWN.items() if adaptive and adaptive.by_client}
    memory = scale(state.memory, 0.0)
    for client, (_, delta) in remembered.items():
        memory = add(memory, delta, WEIGHT[client] * (own[client].beta if own else 1.0))
    known = Recurrence(product=3.0, energy=8.0)  # an adaptive beta of 3/8
    heard = dict.fromkeys(remembered, 0)
    return replace(state, memory=memory, remembered=heard, recurrence=known, own=own), remembered


def mean_step(lab, method, federation, state, remembered, deltas):
    """Expected change of the model, dense, by enumeration of the sixteen participation sets."""
    mean = {name: torch.zeros_like(product) for name, product in lab.products(state).items()}
    for here in itertools.product((False, True), repeat=len(WEIGHT)):
        cohort = tuple(client for client, asked in zip(WEIGHT, here, strict=True) if asked)
        chance = 1.0
        for client, p in PROBABILITY.items():
            chance *= p if client in cohort else 1 - p
        plan = RoundPlan(run="run", round=1, cohort=cohort, probability=PROBABILITY, weight=WEIGHT)
        replies = [lab.update(client, plan, deltas[client]) for client in cohort]
        after = lab.absorb(
            state, plan, replies, memory=Remembered(remembered), method=method, federation=federation
        ).state
        for name, before in lab.products(state).items():
            mean[name] += chance * (lab.products(after)[name] - before)
    return mean


def expected(lab, state, deltas):
    dense = {client: lab.dense(delta, state) for client, delta in deltas.items()}
    return {
        name: sum(WEIGHT[client] * dense[client][name] for client in WEIGHT) for name in lab.products(state)
    }


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.6, 1.0, "adaptive", "adaptive-by-client"])
@pytest.mark.parametrize("init", ["orthonormal", "kaiming"])
def test_importance_is_unbiased_for_every_beta_and_memory(lab, beta, init):
    generator = torch.Generator().manual_seed(1)
    method, federation = lab.method(beta=beta, init=init), lab.federation(participation="importance")
    state, remembered = a_state(lab, method, generator)
    deltas = {client: lab.delta(state, generator) for client in WEIGHT}
    assert_close(mean_step(lab, method, federation, state, remembered, deltas), expected(lab, state, deltas))


def test_normalising_over_participants_is_not(lab):
    # The break: unequal chances of taking part pull the mean towards those who are often there.
    generator = torch.Generator().manual_seed(2)
    method, federation = lab.method(), lab.federation(participation="normalised")
    state, remembered = a_state(lab, method, generator)
    deltas = {client: lab.delta(state, generator) for client in WEIGHT}
    mean, whole = mean_step(lab, method, federation, state, remembered, deltas), expected(lab, state, deltas)
    assert float((mean["x"] - whole["x"]).norm() / whole["x"].norm()) > 0.05
