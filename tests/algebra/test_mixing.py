"""Mixing: FedStale, with FedAvg and FedVARP written as in the papers at its ends."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.algebra.deltas import add, scale
from fedlora.algebra.mixing import RunningMix
from fedlora.errors import BasisError
from fedlora.values import FRAME, Delta, Gauges

LAWS = settings(derandomize=True, max_examples=40, deadline=None)
CLIENTS = ("a", "b", "c", "d", "e")


def running(fresh, stale, memory, factors, weights=None):
    """Everybody of `fresh`, one after the other by name."""
    turn = torch.eye(2, dtype=torch.float64)
    gauges = {basis: Gauges(basis=basis, sites={"x": turn.flip(0) if basis else turn}) for basis in (0, 1)}
    sums = RunningMix(memory, gauges)
    for client in sorted(fresh):
        factor = factors[client]
        sums.replace(fresh[client], stale.get(client), factor=factor, weight=(weights or factors)[client])
        sums.add(replace(fresh[client], basis=0), factor)
    return sums


def mix(fresh, stale, memory, shares, beta):
    return replace(running(fresh, stale, memory, shares).mixed(0, beta, 1.0), basis=FRAME)


def vector(generator):
    return Delta(
        basis=FRAME,
        sites={"x": torch.randn(3, 2, generator=generator, dtype=torch.float64)},
        head={"bias": torch.randn(2, generator=generator, dtype=torch.float64)},
    )


def weighted_sum(weights, deltas):
    """The naive twin: zero, then one after the other."""
    total = Delta(
        basis=FRAME,
        sites={"x": torch.zeros(3, 2, dtype=torch.float64)},
        head={"bias": torch.zeros(2, dtype=torch.float64)},
    )
    for client, delta in deltas.items():
        total = add(total, delta, weights[client])
    return total


@st.composite
def federations(draw):
    """(alpha, p, everybody's update, everybody's stale update, participants)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    mass = [draw(st.floats(0.1, 5.0)) for _ in CLIENTS]
    alpha = {client: value / sum(mass) for client, value in zip(CLIENTS, mass, strict=True)}
    p = {client: draw(st.floats(0.05, 1.0)) for client in CLIENTS}
    updates = {client: vector(generator) for client in CLIENTS}
    heard = draw(st.sets(st.sampled_from(CLIENTS)))
    stale = {client: vector(generator) for client in sorted(heard)}
    return alpha, p, updates, stale, sorted(draw(st.sets(st.sampled_from(CLIENTS))))


def mixed(alpha, p, updates, stale, participants, beta):
    return mix(
        {client: updates[client] for client in participants},
        stale,
        weighted_sum(alpha, stale),
        {client: alpha[client] / p[client] for client in participants},
        beta,
    )


def fedavg(alpha, p, updates, participants):
    """FedStale's first term: sum over S of alpha_k / p_k D_k."""
    return weighted_sum(
        {client: alpha[client] / p[client] for client in participants},
        {client: updates[client] for client in participants},
    )


def fedvarp(alpha, p, updates, stale, participants):
    """Jhunjhunwala et al. 2022: sum over all of alpha_k h_k + sum over S of alpha_k / p_k (D_k - h_k)."""
    old = weighted_sum(alpha, stale)
    for client in participants:
        innovation = add(updates[client], stale[client], -1.0) if client in stale else updates[client]
        old = add(old, innovation, alpha[client] / p[client])
    return old


def assert_same(x, y):
    assert_close(dict(x.sites), dict(y.sites), rtol=1e-10, atol=1e-10)
    assert_close(dict(x.head), dict(y.head), rtol=1e-10, atol=1e-10)


@LAWS
@given(federations())
def test_beta_0_is_fedavg(case):
    alpha, p, updates, _, participants = case
    assert_same(mixed(*case, beta=0.0), fedavg(alpha, p, updates, participants))


@LAWS
@given(federations())
def test_beta_1_is_fedvarp(case):
    assert_same(mixed(*case, beta=1.0), fedvarp(*case))


@LAWS
@given(federations(), st.floats(0, 1))
def test_between_lies_fedstale(case, beta):
    alpha, p, updates, _, participants = case
    between = add(scale(fedavg(alpha, p, updates, participants), 1 - beta), fedvarp(*case), beta)
    assert_same(mixed(*case, beta=beta), between)


@LAWS
@given(federations())
def test_the_running_sum_stays_the_sum_of_what_is_remembered(case):
    alpha, _, updates, stale, participants = case
    fresh = {client: updates[client] for client in participants}
    sums = running(fresh, stale, weighted_sum(alpha, stale), dict.fromkeys(CLIENTS, 0.7), alpha)
    assert_same(sums.memory(), weighted_sum(alpha, {**stale, **fresh}))


def every_participation(p):
    """Each subset of the clients with its probability under independent participation."""
    for draws in itertools.product((False, True), repeat=len(p)):
        chance = 1.0
        for client, here in zip(p, draws, strict=True):
            chance *= p[client] if here else 1 - p[client]
        yield chance, [client for client, here in zip(p, draws, strict=True) if here]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
@settings(derandomize=True, max_examples=8, deadline=None)
@given(case=federations())
def test_the_mean_over_all_participation_sets_is_the_whole_update(beta, case):
    alpha, p, updates, stale, _ = case
    mean = weighted_sum({}, {})
    for chance, participants in every_participation(p):
        mean = add(mean, mixed(alpha, p, updates, stale, participants, beta), chance)
    assert_same(mean, weighted_sum(alpha, updates))


def test_a_memory_that_is_not_the_sum_biases_the_mean():
    # The break: unbiasedness hangs on using the same stale updates in both places.
    generator = torch.Generator().manual_seed(0)
    p = dict.fromkeys(CLIENTS, 0.5)
    alpha = dict.fromkeys(CLIENTS, 0.2)
    updates, stale = ({client: vector(generator) for client in CLIENTS} for _ in range(2))
    mean = weighted_sum({}, {})
    for chance, participants in every_participation(p):
        shares = {client: alpha[client] / p[client] for client in participants}
        fresh = {client: updates[client] for client in participants}
        mean = add(mean, mix(fresh, stale, scale(weighted_sum(alpha, stale), 1.1), shares, 0.5), chance)
    with pytest.raises(AssertionError):
        assert_same(mean, weighted_sum(alpha, updates))


def test_updates_of_several_bases_meet_in_the_one_that_is_asked_for():
    generator = torch.Generator().manual_seed(1)
    here, there, memory = vector(generator), vector(generator), vector(generator)
    sums = running({}, {}, memory, {})
    sums.add(replace(here, basis=0), 0.3)
    sums.add(replace(there, basis=1), 0.5)
    turned = replace(there, sites={"x": there.sites["x"].flip(1)})
    expected = add(scale(memory, 0.4), weighted_sum({"a": 0.15, "b": 0.25}, {"a": here, "b": turned}))
    assert_same(sums.mixed(0, 0.4, 2.0), replace(expected, basis=0))
    back = replace(expected, basis=1, sites={"x": expected.sites["x"].flip(1)})
    assert_same(sums.mixed(1, 0.4, 2.0), back)


def test_nobody_moves_by_beta_times_the_memory_which_stays():
    memory = vector(torch.Generator().manual_seed(1))
    sums = running({}, {}, memory, {})
    assert_same(sums.mixed(0, 0.4, 1.0), replace(scale(memory, 0.4), basis=0))
    assert sums.memory() is memory


def test_an_update_that_is_not_in_the_frame_is_not_remembered():
    generator = torch.Generator().manual_seed(2)
    memory, fresh = vector(generator), replace(vector(generator), basis=0)
    with pytest.raises(BasisError, match="0"):
        running({}, {}, memory, {}).replace(fresh, None, factor=1.0, weight=1.0)
    with pytest.raises(BasisError, match="0"):
        running({}, {}, memory, {}).replace(memory, fresh, factor=1.0, weight=1.0)
    with pytest.raises(BasisError, match="0"):
        RunningMix(fresh, {})
