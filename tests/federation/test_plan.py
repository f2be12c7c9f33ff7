"""Plans: pure, fair, and indifferent to the order of the members."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from fedlora.config.asking import most_asked
from fedlora.errors import ConfigError
from fedlora.federation.plan import plan
from fedlora.values import Member


def planned(lab, members, round_=1, seed=7, **changes):
    state = replace(lab.start(lab.method()), round=round_ - 1)
    return plan(state, members, run="run", federation=lab.federation(**changes), seed=seed)


def cohorts(lab, members, rounds, **changes):
    state, federation = lab.start(lab.method()), lab.federation(**changes)
    return [
        plan(replace(state, round=round_), members, run="run", federation=federation, seed=7).cohort
        for round_ in range(rounds)
    ]


def test_a_plan_depends_on_seed_and_round_and_nothing_else(lab):
    members = lab.members(20)
    first = planned(lab, members, cohort=5)
    assert (first.run, first.round) == ("run", 1)
    assert planned(lab, list(reversed(members)), cohort=5) == first
    assert planned(lab, members, cohort=5, round_=2).cohort != first.cohort
    assert planned(lab, members, cohort=5, seed=8).cohort != first.cohort


def test_a_number_is_a_uniform_draw_without_replacement(lab):
    members, rounds = lab.members(5), 2000
    drawn = cohorts(lab, members, rounds, cohort=2)
    assert all(len(set(cohort)) == 2 and list(cohort) == sorted(cohort) for cohort in drawn)
    pairs = Counter(drawn)
    assert len(pairs) == 10
    # Each of the 10 pairs: binomial(2000, 0.1), standard deviation 13.4; five of them either way.
    assert all(abs(count - 200) < 67 for count in pairs.values())
    assert planned(lab, members, cohort=2).probability == {member.client: 0.4 for member in members}


def test_everybody_may_be_asked(lab):
    assert planned(lab, lab.members(3), cohort=3).cohort == ("client-0", "client-1", "client-2")
    assert (
        planned(lab, lab.members(3), cohort={"probability": 1.0}).cohort
        == planned(lab, lab.members(3), cohort=3).cohort
    )


def test_independent_draws_have_their_own_probabilities(lab):
    members, rounds = lab.members(3), 2000
    chances = {"client-0": 0.1, "client-1": 0.5, "client-2": 1.0, "gone": 0.3}
    drawn = cohorts(lab, members, rounds, cohort={"probability": chances})
    counts = Counter(client for cohort in drawn for client in cohort)
    for member in members:
        p = chances[member.client]
        assert abs(counts[member.client] - rounds * p) <= 5 * math.sqrt(rounds * p * (1 - p))
    together = sum("client-0" in cohort and "client-1" in cohort for cohort in drawn)
    assert abs(together - rounds * 0.05) <= 5 * math.sqrt(rounds * 0.05 * 0.95)
    assert set(planned(lab, members, cohort={"probability": chances}).probability) == {
        m.client for m in members
    }


def test_an_independent_cohort_may_be_empty(lab):
    assert () in cohorts(lab, lab.members(2), 50, cohort={"probability": 0.2})


def test_weights_sum_to_one_over_all_members(lab):
    members = lab.members(4)
    assert planned(lab, members).weight == {member.client: 0.25 for member in members}
    by_examples = planned(lab, members, weighting="examples").weight
    assert by_examples == pytest.approx({"client-0": 0.1, "client-1": 0.2, "client-2": 0.3, "client-3": 0.4})


@pytest.mark.parametrize(
    ("count", "changes", "values"),
    [
        (3, {"cohort": 4}, ["4", "3 members"]),
        (0, {"cohort": {"probability": 0.5}}, ["0 clients"]),
        (2, {"cohort": {"probability": {"client-0": 0.5}}}, ["client-1", "federation.cohort.probability"]),
    ],
)
def test_a_cohort_that_cannot_be_is_a_config_error(lab, count, changes, values):
    with pytest.raises(ConfigError) as caught:
        planned(lab, lab.members(count), **changes)
    assert all(value in str(caught.value) for value in values)


def test_a_roster_that_cannot_be_is_a_config_error(lab):
    with pytest.raises(ConfigError, match="client-1"):
        planned(lab, [*lab.members(3), Member(client="client-1", examples=3)])
    with pytest.raises(ConfigError, match="'empty': 0"):
        planned(lab, [*lab.members(3), Member(client="empty", examples=0)], weighting="examples")


@pytest.mark.parametrize(("clients", "cohort"), [(8, 4), (8, 3), (5, 5), (7, 1)])
def test_in_turn_nobody_is_asked_twice_before_all_others_once(lab, clients, cohort):
    members, laps = lab.members(clients), 40
    turns = clients // cohort
    drawn = cohorts(lab, members, laps * turns, cohort=cohort, reshuffle=True)
    for lap in range(laps):
        asked = [client for turn in drawn[lap * turns : (lap + 1) * turns] for client in turn]
        assert len(asked) == len(set(asked)) == turns * cohort
    assert all(len(one) == cohort and list(one) == sorted(one) for one in drawn)
    most = Counter(client for one in drawn for client in one)
    assert max(most.values()) <= laps
    if 1 < cohort < clients:
        assert len(set(drawn[::turns])) > 3  # each lap has an order of its own


def test_in_turn_each_round_is_a_uniform_draw_by_itself(lab):
    members = lab.members(4)
    state, federation = lab.start(lab.method()), lab.federation(cohort=2, reshuffle=True)
    pairs = Counter(
        plan(replace(state, round=1), members, run="run", federation=federation, seed=seed).cohort
        for seed in range(1200)
    )
    # Each of the 6 pairs: binomial(1200, 1/6), standard deviation 12.9; five of them either way.
    assert len(pairs) == 6 and all(abs(count - 200) < 65 for count in pairs.values())


def test_a_probability_cannot_be_reshuffled(tiny_config):
    with pytest.raises(ConfigError, match=r"federation\.reshuffle: true, but .* write a number of clients"):
        tiny_config(federation__cohort={"probability": 0.5}, federation__reshuffle=True)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"cohort": 4, "reshuffle": True}, 8),
        ({"cohort": 3, "reshuffle": True}, 8),  # two rounds a lap; two sit out
        ({"cohort": 8, "reshuffle": True}, 16),
        ({"cohort": 4}, 16),
        ({"cohort": {"probability": 0.5}}, 16),
    ],
)
def test_nobody_is_asked_more_often_than_said(lab, changes, most):
    federation = lab.federation(rounds=16, **changes)
    assert most_asked(8, federation) == most
    counts = Counter(client for cohort in cohorts(lab, lab.members(8), 16, **changes) for client in cohort)
    assert max(counts.values()) <= most
