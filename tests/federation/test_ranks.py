"""Clients of unequal rank: each column of B moves by the mean of those who trained it, whoever was asked."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedlora.errors import ConfigError
from fedlora.federation.gather import gather
from fedlora.federation.lengths import noise_length
from fedlora.federation.plan import require_plannable
from fedlora.federation.remembered import Remembered
from fedlora.privacy.gaussian import noise_energy
from fedlora.values import DpEvent, RoundPlan

R = 3
RANKS = {"a": 1, "b": 2, "d": 1}  # c trains all
RANK_OF = {**RANKS, "c": R}
PROBABILITY = {"a": 0.15, "b": 0.5, "c": 0.8, "d": 1.0}
WEIGHT = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def planned(cohort, number=1):
    return RoundPlan(run="run", round=number, cohort=tuple(cohort), probability=PROBABILITY, weight=WEIGHT)


def within(delta, k):
    """The delta with zeros beyond its first k columns."""
    kept = torch.arange(R) < k
    return replace(delta, sites={site: b * kept for site, b in delta.sites.items()})


def deltas_of(lab, state, seed=3, ranks=RANK_OF):
    draw = torch.Generator().manual_seed(seed)
    return {client: within(lab.delta(state, draw), ranks[client]) for client in sorted(WEIGHT)}


def gathered(lab, state, cohort, deltas, method=None, **federation):
    plan = planned(cohort, state.round + 1)
    replies = [lab.update(client, plan, deltas[client]) for client in cohort]
    return gather(
        state, plan, replies, memory=Remembered(), method=method or lab.method(),
        federation=lab.federation(**federation),
    )  # fmt: skip


COHORTS = [c for n in range(len(WEIGHT) + 1) for c in itertools.combinations(sorted(WEIGHT), n)]


@pytest.mark.parametrize("cohort", COHORTS, ids=lambda cohort: "".join(cohort) or "nobody")
def test_a_columns_step_is_the_mean_over_those_who_trained_it(lab, cohort):
    state = lab.start(lab.method())
    deltas = deltas_of(lab, state)
    step = gathered(lab, state, cohort, deltas, ranks=RANKS).step
    for site, b in step.sites.items():
        for column in range(R):
            those = [client for client in cohort if RANK_OF[client] > column]
            total = sum(WEIGHT[client] for client in those)
            wanted = sum(
                (WEIGHT[client] / total * deltas[client].sites[site][:, column] for client in those),
                start=torch.zeros(len(b), dtype=torch.float64),
            )
            assert_close(b[:, column], wanted, **EXACT)
            assert those or not bool(b[:, column].any())
    whole = sum(WEIGHT[client] for client in cohort)
    for name, value in step.head.items():  # which everybody trains
        wanted = sum(
            (WEIGHT[c] / whole * deltas[c].head[name] for c in cohort), start=torch.zeros_like(value)
        )
        assert_close(value, wanted, **EXACT)


def test_a_column_that_nobody_trained_stays_where_it_was(lab):
    method = lab.method("ffa")
    state, federation = lab.start(method), lab.federation(ranks=RANKS)
    deltas = deltas_of(lab, state)
    for cohort in (("c",), ("a", "b")):
        before, plan = state.adapters.sites, planned(cohort, state.round + 1)
        replies = [lab.update(client, plan, deltas[client]) for client in cohort]
        state = lab.absorb(state, plan, replies, method=method, federation=federation).state
    for site, factors in state.adapters.sites.items():
        assert bool(before[site].b.all())  # c has moved all three
        assert torch.equal(factors.b[:, 2], before[site].b[:, 2])
        assert not bool((factors.b[:, :2] == before[site].b[:, :2]).any())


@pytest.mark.parametrize("ranks", [RANKS, {**RANKS, "c": 2}], ids=["one of full rank", "none"])
def test_importance_is_unbiased_for_each_columns_mean(lab, ranks):
    rank_of = {**RANK_OF, **ranks}
    state = lab.start(lab.method())
    deltas = deltas_of(lab, state, ranks=rank_of)
    mean = {site: torch.zeros_like(factors.b) for site, factors in state.adapters.sites.items()}
    head = torch.zeros(2, 4, dtype=torch.float64)
    for cohort in COHORTS:
        chance = math.prod(p if client in cohort else 1 - p for client, p in PROBABILITY.items())
        step = gathered(lab, state, cohort, deltas, participation="importance", ranks=ranks).step
        head += chance * step.head["weight"]
        for site, b in step.sites.items():
            mean[site] += chance * b
    for site, found in mean.items():
        for column in range(R):
            those = [client for client in WEIGHT if rank_of[client] > column]
            total = sum(WEIGHT[client] for client in those)
            parts = (WEIGHT[client] / total * deltas[client].sites[site][:, column] for client in those)
            assert_close(found[:, column], sum(parts, start=torch.zeros(len(found)).double()), **EXACT)
    assert_close(head, sum(WEIGHT[client] * deltas[client].head["weight"] for client in WEIGHT), **EXACT)


@pytest.mark.parametrize("participation", ["normalised", "importance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_all_train_all_columns_not_a_bit_is_another(lab, participation, dtype):
    state = lab.start(lab.method(), dtype=dtype)
    deltas = deltas_of(lab, state, ranks=dict.fromkeys(WEIGHT, R))
    cohort = tuple(WEIGHT)
    plain = gathered(lab, state, cohort, deltas, participation=participation)
    named = gathered(lab, state, cohort, deltas, participation=participation, ranks=dict.fromkeys(WEIGHT, R))
    for site, b in plain.step.sites.items():
        assert torch.equal(b, named.step.sites[site])
    assert plain.report.released == named.report.released


def test_a_round_of_clients_of_full_rank_is_what_it_was_among_others_of_less(lab):
    state = lab.start(lab.method(), dtype=torch.float32)
    deltas = deltas_of(lab, state, ranks=dict.fromkeys(WEIGHT, R))
    plain = gathered(lab, state, ("b", "c"), deltas).step
    named = gathered(lab, state, ("b", "c"), deltas, ranks={"a": 1, "d": 2}).step
    assert all(torch.equal(b, named.sites[site]) for site, b in plain.sites.items())


def test_an_update_beyond_its_clients_rank_does_not_count(lab):
    state = lab.start(lab.method())
    deltas = deltas_of(lab, state)
    sites = dict(deltas["a"].sites)
    sites["y"] = sites["y"].clone()
    sites["y"][0, 1] = 1e-30
    deltas["a"] = replace(deltas["a"], sites=sites)
    found = gathered(lab, state, ("a", "c"), deltas, ranks=RANKS)
    assert found.report.answered == ("c",)
    assert "'y' has 1 columns beyond the client's 1 that are not zero" in found.report.rejected["a"]
    alone = gathered(lab, state, ("c",), deltas, ranks=RANKS)
    assert all(torch.equal(b, alone.step.sites[site]) for site, b in found.step.sites.items())


def after_a_round(lab, method, federation):
    """The state after one round of b and c, and the updates that a and c owe it still."""
    state = lab.start(method)
    deltas, plan = deltas_of(lab, state), planned(("a", "b", "c", "d"))
    replies = [lab.update(client, plan, deltas[client]) for client in ("b", "d")]
    late = {client: lab.update(client, plan, deltas[client]) for client in ("a", "c")}
    return lab.absorb(state, plan, replies, method=method, federation=federation).state, late


def test_late_columns_count_where_the_basis_is_still_theirs(lab):
    method, federation = lab.method("ffa"), lab.federation(ranks=RANKS)
    state, late = after_a_round(lab, method, federation)
    fresh = deltas_of(lab, state, seed=8)["d"]
    plan = planned(("d",), 2)
    replies = [lab.update("d", plan, fresh), late["a"]]
    found = gather(state, plan, replies, memory=Remembered(), method=method, federation=federation)
    assert found.heard == {"a": 1, "d": 2}
    for site, b in found.step.sites.items():
        wanted = (0.4 * fresh.sites[site] + 0.1 * late["a"].delta.sites[site])[:, 0] / 0.5
        assert_close(b[:, 0], wanted, **EXACT)
        assert not bool(b[:, 1:].any())


def test_after_a_refactorisation_late_updates_count_of_those_who_train_all_columns_only(lab):
    method, federation = lab.method("fedsvd"), lab.federation(ranks=RANKS)
    state, late = after_a_round(lab, method, federation)
    fresh = deltas_of(lab, state, seed=8)["b"]
    plan = planned(("b",), 2)
    replies = [lab.update("b", plan, fresh), *late.values()]
    found = gather(state, plan, replies, memory=Remembered(), method=method, federation=federation)
    assert found.heard == {"b": 2, "c": 1}
    assert (
        "the first 1 of 3 columns of basis 0, which are no columns of basis 1" in found.report.rejected["a"]
    )
    for site, b in found.step.sites.items():
        # c's in the columns of now: the same change of the model
        turned = late["c"].delta.sites[site] @ lab.start(method).adapters.sites[site].a
        turned = turned @ torch.linalg.pinv(state.adapters.sites[site].a)
        wanted = 0.2 * fresh.sites[site] + 0.3 * turned
        wanted = wanted / torch.tensor([0.5, 0.5, 0.3], dtype=torch.float64)
        assert_close(b, wanted, rtol=1e-9, atol=1e-10)


def test_the_noise_in_an_update_is_that_of_the_numbers_it_was_trained_in(lab):
    state = lab.start(lab.method())
    found = gathered(lab, state, tuple(WEIGHT), deltas_of(lab, state), ranks=RANKS)
    for client, update in found.report.released.items():
        assert update.numbers == sum(d_out * RANK_OF[client] for d_out, _ in lab.shapes.values()) + 2 * 4
    spent = DpEvent(noise_multiplier=1.5, sample_rate=0.1, steps=1, expected_batch=8.0, max_draw=20)
    federation = lab.federation(ranks=RANKS)
    lengths = {
        client: noise_length(replace(update, spent=spent), federation, 0.5)
        for client, update in found.report.released.items()
    }
    assert lengths["a"] == pytest.approx(0.1 / 8 * math.sqrt(noise_energy(0.5, 1.5, (7 + 5) * 1 + 8)))
    assert lengths["a"] == lengths["d"] < lengths["b"] < lengths["c"]


def test_a_rank_for_nobody_is_refused(lab):
    members = lab.members(2)
    require_plannable(members, lab.federation(ranks={"client-0": 1}))
    with pytest.raises(ConfigError, match=r"federation\.ranks names \['client-7'\], who are no members"):
        require_plannable(members, lab.federation(ranks={"client-7": 1}))
