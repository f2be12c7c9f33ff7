"""An adaptive beta through a server's rounds: what it minimises, what it knows, and what it survives."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedlora.algebra.deltas import add, joint_norm, scale
from fedlora.federation.absorb import forget
from fedlora.federation.gather import gather
from fedlora.federation.plan import plan
from fedlora.federation.remembered import Remembered
from fedlora.federation.store import Store, state_digest
from fedlora.methods.mixing import Adaptive
from fedlora.values import FRAME, Recurrence, RoundPlan

NAMES = ("a", "b", "c", "d", "e")
NOBODY = Recurrence()
EVEN = dict.fromkeys(NAMES, 0.2)
UNEVEN = dict(zip(NAMES, (0.3, 0.25, 0.2, 0.15, 0.1), strict=True))


def heard(lab, state, cohort, deltas, remembered, *, method, federation, weight):
    planned = RoundPlan(
        run="run",
        round=state.round + 1,
        cohort=cohort,
        probability=dict.fromkeys(NAMES, 0.4),
        weight=weight,
    )
    replies = [lab.update(client, planned, deltas[client]) for client in cohort]
    return gather(
        state, planned, replies, memory=Remembered(remembered), method=method, federation=federation
    )


def a_state(lab, method, weight, generator):
    state = lab.start(method)
    common = lab.delta(state, generator, FRAME)
    held = {client: (0, add(common, lab.delta(state, generator, FRAME))) for client in NAMES}
    memory = scale(state.memory, 0.0)
    for client, (_, delta) in held.items():
        memory = add(memory, delta, weight[client])
    fresh = {
        client: replace(add(scale(delta, 0.6), lab.delta(state, generator, FRAME)), basis=0)
        for client, (_, delta) in held.items()
    }
    return replace(state, memory=memory, remembered=dict.fromkeys(NAMES, 0)), held, fresh


COHORTS = {
    "each by a coin": (
        {"cohort": {"probability": 0.4}, "participation": "importance"},
        UNEVEN,
        [
            (0.4 ** len(cohort) * 0.6 ** (5 - len(cohort)), cohort)
            for n in range(6)
            for cohort in itertools.combinations(NAMES, n)
        ],
    ),
    "so many": ({"cohort": 2}, EVEN, [(0.1, cohort) for cohort in itertools.combinations(NAMES, 2)]),
}


@pytest.mark.parametrize("how", sorted(COHORTS))
def test_expected_over_all_cohorts_it_is_the_beta_of_least_variance(lab, how):
    """With `ffa` and an orthonormal A the frame is basis 0, so steps of either are compared as they are."""
    words, weight, cohorts = COHORTS[how]
    federation = lab.federation(**words)
    state, held, fresh = a_state(lab, lab.method("ffa"), weight, torch.Generator().manual_seed(1))

    def after(cohort, method):
        how = {"method": method, "federation": federation, "weight": weight}
        return heard(lab, state, cohort, fresh, held, **how)

    def variance(beta):
        steps = [(chance, after(cohort, lab.method("ffa", beta=beta))) for chance, cohort in cohorts]
        mean = scale(steps[0][1].step, 0.0)
        for chance, found in steps:
            mean = add(mean, found.step, chance)
        return sum(chance * joint_norm(add(found.step, mean, -1.0)) ** 2 for chance, found in steps)

    adaptive = lab.method("ffa", beta="adaptive", smoothing=0.0)
    sums = [(chance, after(cohort, adaptive).recurrence) for chance, cohort in cohorts]
    beta = sum(c * known.product for c, known in sums) / sum(c * known.energy for c, known in sums)
    low, middle, high = (variance(x) for x in (0.0, 0.5, 1.0))  # a parabola
    assert beta == pytest.approx((3 * low - 4 * middle + high) / (4 * (low - 2 * middle + high)), rel=1e-9)
    assert 0.1 < beta < 0.95


def ran(lab, beta, rounds, *, store=None, order=lambda replies: replies, smoothing=0.9, dtype=torch.float32):
    """Clients keep a direction of their own. Yields the state after each round."""
    method, federation = lab.method(beta=beta, smoothing=smoothing), lab.federation(cohort=3)
    members, memory = lab.members(5), Remembered() if store is None else store.memory
    state, own = lab.start(method, dtype=dtype), torch.Generator().manual_seed(1)
    # In the frame, whatever the basis of a round.
    signal = {member.client: lab.delta(state, own, FRAME) for member in members}
    for number in range(1, rounds + 1):
        if store is not None and not store.is_empty():
            state = store.load()[0]
        planned = plan(state, members, run="run", federation=federation, seed=7)
        noise = torch.Generator().manual_seed(100 + number)
        gauge = state.gauges[-1].sites
        replies = []
        for client in planned.cohort:
            told = add(signal[client], lab.delta(state, noise, FRAME), 0.5)
            sites = {
                site: value @ torch.linalg.inv(gauge[site]).to(value) for site, value in told.sites.items()
            }
            replies.append(
                lab.update(client, planned, replace(told, basis=state.adapters.basis, sites=sites))
            )
        absorbed = lab.absorb(
            state, planned, order(replies), memory=memory, method=method, federation=federation
        )
        state = absorbed.state
        if store is not None:
            store.checkpoints.mkdir(exist_ok=True)
            store.commit(absorbed, {"round": number})
        yield state


def test_before_anybody_is_heard_again_it_is_fedavg_to_the_bit(lab):
    (first,), (plain,) = ran(lab, "adaptive", 1), ran(lab, 0.0, 1)
    assert first.recurrence == NOBODY
    assert state_digest(first) == state_digest(plain)


def test_of_signals_that_stay_most_is_repeated_and_a_number_for_beta_knows_nothing(lab):
    *_, last = ran(lab, "adaptive", 30)
    # SNR 4: 0.8; 30 rounds of three clients' 79 numbers, one round deciding about a tenth.
    assert Adaptive(smoothing=0.9).beta(last.recurrence) == pytest.approx(0.8, abs=0.1)
    *_, fixed = ran(lab, 0.8, 10)
    assert fixed.recurrence == NOBODY


def test_a_round_uses_what_earlier_rounds_knew(lab):
    *_, before, after = ran(lab, "adaptive", 12, smoothing=0.0)
    known = Adaptive(smoothing=0.0).beta(before.recurrence)
    assert after.recurrence != before.recurrence
    # The same last round, with that number for all of its rounds' beta, moves alike.
    method, federation = lab.method(beta=known), lab.federation(cohort=3)
    planned = plan(before, lab.members(5), run="run", federation=federation, seed=7)
    moved = lab.absorb(before, planned, [], method=method, federation=federation).state
    other = lab.absorb(before, planned, [], method=lab.method(beta="adaptive"), federation=federation).state
    assert state_digest(moved) == state_digest(other)


@pytest.mark.parametrize("beta", ["adaptive", "adaptive-by-client"])
def test_neither_the_order_of_replies_nor_a_stop_after_every_round_changes_a_bit(lab, tmp_path, beta):
    *_, plain = ran(lab, beta, 8)
    *_, turned = ran(lab, beta, 8, order=lambda replies: replies[::-1])
    *_, stopped = ran(lab, beta, 8, store=Store(tmp_path))
    assert bool(plain.own) == (beta == "adaptive-by-client")
    loaded = Store(tmp_path).load()[0]
    for other in (turned, stopped, loaded):
        assert other.recurrence == plain.recurrence != NOBODY
        assert other.own == plain.own
        assert state_digest(other) == state_digest(plain)
        assert_close(dict(other.memory.sites), dict(plain.memory.sites), rtol=0, atol=0)


def test_a_checkpoint_of_before_there_was_such_a_thing_can_be_read(lab, tmp_path):
    *_, last = ran(lab, 0.5, 2, store=Store(tmp_path))
    for path in tmp_path.glob("checkpoints/*/state.json"):
        words = json.loads(path.read_text())
        del words["recurrence"]
        path.write_text(json.dumps(words))
    assert state_digest(Store(tmp_path).load()[0]) == state_digest(last)


def test_once_a_client_is_forgotten_nothing_is_known(lab):
    *_, last = ran(lab, "adaptive", 8)
    assert last.recurrence != NOBODY
    left = forget(last, "client-1", scale(last.memory, 0.0), 0.2)
    assert left.recurrence == NOBODY


@pytest.mark.parametrize(
    ("known", "beta"), [((3.0, 4.0), 0.75), ((-1.0, 4.0), 0.0), ((9.0, 4.0), 1.0), ((0.0, 0.0), 0.0)]
)
def test_it_lies_between_fedavg_and_fedvarp(known, beta):
    assert Adaptive(smoothing=0.5).beta(Recurrence(product=known[0], energy=known[1])) == beta


def test_a_round_without_news_takes_nothing_away():
    known, adaptive = Recurrence(product=1.0, energy=2.0), Adaptive(smoothing=0.5)
    assert adaptive.after(known, NOBODY) == known
    assert adaptive.after(known, Recurrence(product=3.0, energy=4.0)) == Recurrence(product=3.5, energy=5.0)


def test_each_client_has_the_beta_of_its_own_signal(lab):
    """One repeats itself, one sends noise; a third is heard once, and has what the two had before."""
    federation = lab.federation(cohort={"probability": 0.4}, participation="importance")
    method = lab.method("ffa", beta="adaptive-by-client")
    state, memory, draw = lab.start(method), Remembered(), torch.Generator().manual_seed(3)
    signal = lab.delta(state, draw)
    for number in range(1, 7):
        told = {
            "a": add(signal, lab.delta(state, draw), 0.1),
            "b": lab.delta(state, draw),
            "c": lab.delta(state, draw),
        }
        cohort = ("a", "b", "c") if number == 6 else ("a", "b")
        before = state
        planned = RoundPlan(
            run="run", round=number, cohort=cohort, probability=dict.fromkeys(NAMES, 0.4), weight=EVEN
        )
        replies = [lab.update(client, planned, told[client]) for client in cohort]
        state = lab.absorb(state, planned, replies, memory=memory, method=method, federation=federation).state
    # 79 numbers and five pairs: three standard errors of a slope are 3 / sqrt(5 * 79) = 0.15.
    assert state.own["a"].beta == pytest.approx(1 / 1.01, abs=0.02)
    assert state.own["b"].beta < 0.15
    assert state.own["c"].beta == Adaptive(smoothing=0.9).beta(before.recurrence)
    assert state.own["b"].beta < state.own["c"].beta < state.own["a"].beta
    assert state.own["c"].recurrence == NOBODY
