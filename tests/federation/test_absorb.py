"""Absorbing a round: what counts, what does not, and that the order of arrival is nothing."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.absorb import start
from fedlora.federation.gather import Gathering, gather
from fedlora.federation.plan import plan
from fedlora.federation.remembered import Remembered
from fedlora.values import FRAME, Refusal, RefusalReason


def a_round(lab, state, federation, count=3):
    return plan(state, lab.members(count), run="run", federation=federation, seed=7)


def rounds(lab, method, federation, count, generator, state=None):
    """State after `count` rounds in which the whole cohort answers, without memory."""
    state = lab.start(method) if state is None else state
    for _ in range(count):
        planned = a_round(lab, state, federation)
        replies = [lab.update(client, planned, lab.delta(state, generator)) for client in planned.cohort]
        state = lab.absorb(state, planned, replies, method=method, federation=federation).state
    return state


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_the_first_state_changes_nothing(lab):
    for init, name in itertools.product(("orthonormal", "kaiming"), ("fedsvd", "ffa", "fedavg")):
        state = lab.start(lab.method(name, init=init))
        assert (state.round, state.adapters.basis, state.memory.basis, state.remembered) == (0, 0, FRAME, {})
        assert state.adapters.scale == 2.0  # lora_alpha 6, r 3
        assert not any(bool(product.any()) for product in lab.products(state).values())
        for site, frame in state.frame.items():
            a = state.adapters.sites[site].a
            assert_close(frame @ frame.T, torch.eye(3, dtype=torch.float64))
            assert_close(state.gauges[0].sites[site] @ frame, a)


def test_a_rank_that_no_site_can_hold_is_a_config_error(lab):
    with pytest.raises(ConfigError, match=r"lora\.r 3 .*'small'.*\(7, 2\).*2"):
        start({"small": (7, 2)}, head={}, lora_cfg=lab.lora(), method=lab.method(), dtype=torch.float32)


@pytest.mark.parametrize("init", ["orthonormal", "kaiming"])
@pytest.mark.parametrize("name", ["fedsvd", "ffa", "fedavg"])
def test_a_full_round_moves_the_model_by_the_mean_update(lab, generator, name, init):
    method, federation = lab.method(name, init=init), lab.federation(cohort=3)
    state = rounds(lab, method, federation, 2, generator)
    planned = a_round(lab, state, federation)
    deltas = {client: lab.delta(state, generator) for client in planned.cohort}
    replies = [lab.update(client, planned, delta) for client, delta in deltas.items()]
    absorbed = lab.absorb(state, planned, replies, method=method, federation=federation)
    for site, before in lab.products(state).items():
        mean = sum(lab.dense(delta, state)[site] for delta in deltas.values()) / 3
        assert_close(lab.products(absorbed.state)[site], before + mean)
    assert absorbed.state.round == 3
    assert absorbed.state.adapters.basis == (3 if name == "fedsvd" else 0)
    assert absorbed.report.answered == absorbed.report.asked == planned.cohort
    assert absorbed.report.answered == planned.cohort
    assert absorbed.state.remembered == dict.fromkeys(planned.cohort, 3)


def test_without_beta_nothing_is_remembered(lab, generator):
    method, federation = lab.method(beta=0.0), lab.federation()
    state = lab.start(method)
    planned = a_round(lab, state, federation)
    replies = [lab.update(client, planned, lab.delta(state, generator)) for client in planned.cohort]
    memory = Remembered()
    absorbed = lab.absorb(state, planned, replies, memory=memory, method=method, federation=federation)
    assert memory.updates == {}
    assert not bool(absorbed.state.memory.sites["x"].any())


def test_the_order_of_replies_changes_no_bit(lab, generator):
    method, federation = lab.method(beta=0.5), lab.federation(cohort=3)
    state = lab.start(method, dtype=torch.float32)
    planned = a_round(lab, state, federation)
    replies = [lab.update(client, planned, lab.delta(state, generator)) for client in planned.cohort]
    replies += [replace(replies[1], client="stranger"), replace(replies[1], round=9)]
    outcomes = [
        lab.absorb(state, planned, order, method=method, federation=federation)
        for order in itertools.permutations(replies)
    ]
    first = outcomes[0]
    for other in outcomes[1:]:
        assert other.report == first.report
        assert other.state.remembered == first.state.remembered
        for site in lab.shapes:
            assert torch.equal(other.state.adapters.sites[site].b, first.state.adapters.sites[site].b)
            assert torch.equal(other.state.memory.sites[site], first.state.memory.sites[site])


def with_tensor(update, change, name="x"):
    sites = {**update.delta.sites, name: change(update.delta.sites["x"].clone())}
    return replace(update, delta=replace(update.delta, sites=sites))


def with_nan(tensor):
    tensor[0, 0] = torch.nan
    return tensor


REJECTED = {
    "nan": (lambda update: with_tensor(update, with_nan), ["'x'", "1 entries"]),
    "far below": (lambda update: with_tensor(update, lambda t: t - 1e7), ["'x'", "beyond 1e+06"]),
    "far above": (lambda update: with_tensor(update, lambda t: t + 1e7), ["'x'", "beyond 1e+06"]),
    "infinite": (lambda update: with_tensor(update, lambda t: t / 0), ["'x'", "not finite"]),
    "shape": (lambda update: with_tensor(update, lambda t: t[:, :2]), ["'x'", "(7, 2)", "(7, 3)"]),
    "broadcastable": (lambda update: with_tensor(update, lambda t: t[:1]), ["(1, 3)"]),
    "dtype": (lambda update: with_tensor(update, lambda t: t.float()), ["float32", "float64"]),
    "unknown site": (
        lambda update: with_tensor(update, lambda t: t, name="z"),
        ["0 tensors missing", "1 unknown"],
    ),
    "no head": (lambda update: replace(update, delta=replace(update.delta, head={})), ["'weight'"]),
    "unknown client": (lambda update: replace(update, client="stranger"), ["'stranger'"]),
    "not asked": (lambda update: replace(update, client="spare"), ["not asked in round 4"]),
    "other run": (lambda update: replace(update, run="else"), ["another run than 'run'"]),
    "future": (lambda update: replace(update, round=5), ["5", "4"]),
    "no round": (lambda update: replace(update, round=0), ["0"]),
    "other basis": (
        lambda update: replace(update, delta=replace(update.delta, basis=2)),
        ["basis 2", "round 4", "sent in 3"],
    ),
    "impossible basis": (
        lambda update: replace(update, round=3, delta=replace(update.delta, basis=8)),
        ["basis 8", "now 3"],
    ),
    "the frame itself": (
        lambda update: replace(update, round=3, delta=replace(update.delta, basis=FRAME)),
        ["basis -1"],
    ),
    "too old a basis": (
        lambda update: replace(update, round=1, delta=replace(update.delta, basis=0)),
        ["basis 0", "back only to 2 (now 3)", "federation.keep_gauges to 3"],
    ),
}


@pytest.mark.parametrize("case", sorted(REJECTED))
@pytest.mark.fault("F23", "F27")
def test_what_does_not_fit_is_rejected_whole_and_harms_nobody(lab, generator, case):
    spoil, values = REJECTED[case]
    method, federation = lab.method(beta=0.5), lab.federation(keep_gauges=1, cohort=3)
    state = replace(rounds(lab, lab.method(), federation, 3, generator), remembered={})
    planned = a_round(lab, state, federation)
    planned = replace(planned, weight={**planned.weight, "spare": 0.0})
    good = lab.update("client-0", planned, lab.delta(state, generator))
    bad = spoil(lab.update("client-1", planned, lab.delta(state, generator)))
    memory = Remembered()
    alone, beside = (
        lab.absorb(state, planned, replies, memory=memory, method=method, federation=federation)
        for replies in ([good], [good, bad])
    )
    assert beside.report.answered == ("client-0",)
    assert list(beside.report.rejected) == [bad.client]
    assert all(value in beside.report.rejected[bad.client] for value in values), beside.report.rejected
    assert set(memory.updates) == {"client-0"}
    for site in lab.shapes:
        assert torch.equal(beside.state.adapters.sites[site].b, alone.state.adapters.sites[site].b)


def test_of_two_updates_of_one_client_for_one_round_one_counts(lab, generator):
    method, federation = lab.method(), lab.federation(cohort=3)
    state = lab.start(method)
    planned = a_round(lab, state, federation)
    twice = [lab.update("client-0", planned, lab.delta(state, generator)) for _ in range(2)]
    good = lab.update("client-1", planned, lab.delta(state, generator))
    report = lab.absorb(state, planned, [*twice, good], method=method, federation=federation).report
    assert report.answered == ("client-0", "client-1")
    assert report.rejected == {"client-0": "another update for round 1 came first; only one counts"}


def test_a_refusal_is_noted_with_its_reason(lab, generator):
    method, federation = lab.method(), lab.federation(cohort=3)
    state = lab.start(method)
    planned = a_round(lab, state, federation)
    replies = [
        Refusal(client="client-0", run="run", round=1, reason=RefusalReason.BUDGET),
        Refusal(client="client-1", run="else", round=1, reason=RefusalReason.BUDGET),
        lab.update("client-2", planned, lab.delta(state, generator)),
    ]
    report = lab.absorb(state, planned, replies, method=method, federation=federation).report
    assert report.refused == {"client-0": "budget"}
    assert list(report.rejected) == ["client-1"]
    assert report.answered == ("client-2",)


@pytest.mark.parametrize("participation", ["normalised", "importance"])
def test_a_late_update_counts_as_what_it_did_to_the_model_it_was_given(lab, generator, participation):
    federation = lab.federation(cohort=3, participation=participation)
    method = lab.method(init="kaiming")
    old = rounds(lab, method, federation, 2, generator)
    sent = a_round(lab, old, federation)
    late = lab.update("client-0", sent, lab.delta(old, generator))
    state = replace(rounds(lab, method, federation, 4, generator, state=old), remembered={"client-0": 2})
    planned = a_round(lab, state, federation)
    absorbed = lab.absorb(state, planned, [late], method=method, federation=federation)
    share = 1.0 if participation == "normalised" else 1 / 3
    for site, before in lab.products(state).items():
        after = lab.products(absorbed.state)[site]
        assert_close(after, before + share * lab.dense(late.delta, old)[site])
    assert absorbed.report.round == 7
    assert absorbed.report.answered == ("client-0",)
    again = lab.absorb(
        absorbed.state,
        a_round(lab, absorbed.state, federation),
        [late],
        method=method,
        federation=federation,
    )
    assert again.report.rejected == {"client-0": "update of round 3, but one of round 3 has counted already"}


def test_of_a_late_and_a_timely_update_the_timely_counts(lab, generator):
    method, federation = lab.method(), lab.federation(cohort=3)
    old = lab.start(method)
    late = lab.update("client-0", a_round(lab, old, federation), lab.delta(old, generator))
    state = lab.absorb(old, a_round(lab, old, federation), [], method=method, federation=federation).state
    planned = a_round(lab, state, federation)
    timely = lab.update("client-0", planned, lab.delta(state, generator))
    both = lab.absorb(state, planned, [timely, late], method=method, federation=federation)
    assert both.report.answered == ("client-0",)
    assert both.report.rejected == {"client-0": "update of round 1 came with one of round 2"}
    assert_close(lab.products(both.state)["x"], lab.dense(timely.delta, state)["x"])


def test_gauges_reach_keep_gauges_bases_back(lab, generator):
    federation = lab.federation(keep_gauges=2)
    svd = rounds(lab, lab.method(), federation, 5, generator)
    assert [gauges.basis for gauges in svd.gauges] == [3, 4, 5]
    every_other = rounds(lab, lab.method(refactor_every=2), federation, 5, generator)
    assert [gauges.basis for gauges in every_other.gauges] == [0, 1, 2]
    frozen = rounds(lab, lab.method("ffa"), federation, 5, generator)
    assert [gauges.basis for gauges in frozen.gauges] == [0]
    for state in (svd, every_other, frozen):
        for site, frame in state.frame.items():
            assert_close(state.gauges[-1].sites[site] @ frame, state.adapters.sites[site].a)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_round_without_answers_moves_by_the_memory_alone(lab, generator, beta):
    method, federation = lab.method(beta=beta), lab.federation(cohort=3)
    state = rounds(lab, method, federation, 1, generator)
    absorbed = lab.absorb(state, a_round(lab, state, federation), [], method=method, federation=federation)
    memory = lab.dense_in_frame(state.memory, state)
    for site, before in lab.products(state).items():
        assert_close(lab.products(absorbed.state)[site], before + beta * memory[site])
    assert absorbed.state.round == 2
    assert absorbed.report.answered == ()
    assert absorbed.state.remembered == state.remembered


def test_a_plan_of_another_round_is_not_absorbed(lab):
    method, federation = lab.method(), lab.federation()
    state = lab.start(method)
    planned = replace(a_round(lab, state, federation), round=3)
    with pytest.raises(IncompleteError, match="round 3"):
        lab.absorb(state, planned, [], method=method, federation=federation)


def test_a_lost_memory_is_not_taken_for_zero(lab, generator):
    method, federation = lab.method(beta=0.5), lab.federation(cohort=3)
    state = rounds(lab, method, federation, 1, generator)
    planned = a_round(lab, state, federation)
    reply = lab.update("client-0", planned, lab.delta(state, generator))
    with pytest.raises(IncompleteError, match="'client-0' remembered from round 1"):
        lab.absorb(state, planned, [reply], method=method, federation=federation)


def test_replies_in_the_order_of_the_plan_are_let_go_one_by_one(lab, generator):
    method, federation = lab.method(beta=0.5), lab.federation(cohort=3)
    state = lab.start(method)
    planned = a_round(lab, state, federation)
    dropped = []

    def answers():
        for client in planned.cohort:
            update = lab.update(client, planned, lab.delta(state, generator))
            weakref.finalize(update.delta.sites["x"], dropped.append, client)
            yield update
            del update
            assert dropped == list(planned.cohort[: planned.cohort.index(client)])

    gather(state, planned, answers(), memory=Remembered(), method=method, federation=federation)


def test_whoever_comes_before_its_turn_waits_and_counts_all_the_same(lab, generator):
    method, federation = lab.method(beta=0.5), lab.federation(cohort=3)
    state = lab.start(method)
    planned = a_round(lab, state, federation)
    first, second, third = (
        lab.update(client, planned, lab.delta(state, generator)) for client in planned.cohort
    )
    memory = Remembered()
    gathering = Gathering(state, planned, memory=memory, method=method, federation=federation)
    kept = []
    for reply in (third, second, first):
        gathering.take(reply)
        kept.append(list(memory.updates))
    assert kept == [[], [], list(planned.cohort)]
    assert gathering.counting == 3 and gathering.close().heard == dict.fromkeys(planned.cohort, 1)


def test_enough_clients_end_a_round_and_refusals_are_none(lab, generator):
    method, federation = lab.method(), lab.federation(cohort=3)
    state = lab.start(method)
    planned = a_round(lab, state, federation)
    refusal = Refusal(client="client-0", run="run", round=1, reason=RefusalReason.BUDGET)
    replies = iter(
        [refusal, *(lab.update(c, planned, lab.delta(state, generator)) for c in planned.cohort[1:])]
    )
    heard = gather(
        state, planned, replies, memory=Remembered(), method=method, federation=federation, enough=1
    )
    assert heard.report.answered == ("client-1",)
    assert [left.client for left in replies] == ["client-2"]


def test_a_faulty_reply_before_the_one_that_counts_changes_no_bit(lab, generator):
    method, federation = lab.method(beta=0.5), lab.federation(cohort=3)
    state = lab.start(method, dtype=torch.float32)
    planned = a_round(lab, state, federation)
    replies = [lab.update(client, planned, lab.delta(state, generator)) for client in planned.cohort]
    faulty = with_tensor(replies[0], lambda tensor: tensor[:, :2])
    plain, after = (
        lab.absorb(state, planned, order, method=method, federation=federation).state.adapters
        for order in (replies, [faulty, *replies[1:], replies[0]])
    )
    assert all(torch.equal(after.sites[site].b, plain.sites[site].b) for site in lab.shapes)
