"""What the owner's node.yaml does not allow is refused before a record is read, and costs nothing."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.algebra.deltas import tensors
from fedlora.code_digest import code_digest
from fedlora.config.node import Accepted
from fedlora.deploy.node import MOST_NAME, DeployedNode, own_terms
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import events_of
from fedlora.privacy.step import spent
from fedlora.training.checkpoints import base_digest, weights_digest
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, DpEvent, LocalWork, Refusal, RefusalReason, TrainRequest
from tests.deploy.nodes import debits, first_request, reason, without_records


def misfits(request: TrainRequest) -> Iterator[TrainRequest]:
    adapters = request.adapters
    site, factors = next(iter(adapters.sites.items()))

    def with_site(**changes: torch.Tensor) -> TrainRequest:
        sites = {**adapters.sites, site: replace(factors, **changes)}
        return replace(request, adapters=replace(adapters, sites=sites))

    yield replace(request, round=0)
    yield replace(request, run="")
    yield replace(request, run="r" * (MOST_NAME + 1))
    yield replace(request, base_model="0" * 64)
    yield replace(request, base_model="")
    yield replace(request, work=LocalWork(steps=3, learning_rate=1.0))
    yield replace(request, work=LocalWork(steps=0, learning_rate=1.0))
    for rate in (1.5, 0.0, -1.0, float("nan"), float("inf")):
        yield replace(request, work=LocalWork(steps=2, learning_rate=rate))
    yield replace(request, work=LocalWork(steps=2, learning_rate=1.0, proximal=0.5))  # the node has none
    yield replace(request, work=LocalWork(steps=2, learning_rate=1.0, precondition="lora-pro"))  # nor this
    for side in ("a", "both"):
        yield replace(request, work=LocalWork(steps=2, learning_rate=1.0, side=side))  # its A is frozen
    yield with_site(rest=torch.full((factors.b.shape[0], factors.a.shape[1]), torch.nan))
    yield replace(request, adapters=replace(adapters, scale=7.0))
    yield replace(request, adapters=replace(adapters, head={}))
    renamed = {f"x.{name}": tensor for name, tensor in adapters.head.items()}
    yield replace(request, adapters=replace(adapters, head=renamed))
    infinite = {name: torch.full_like(tensor, torch.inf) for name, tensor in adapters.head.items()}
    yield replace(request, adapters=replace(adapters, head=infinite))
    rows, columns = factors.b.shape[0], factors.a.shape[1]
    yield with_site(a=torch.zeros(3, columns), b=torch.zeros(rows, 3))  # another rank
    yield with_site(a=torch.zeros(2, columns + 1))
    yield with_site(b=torch.zeros(rows + 1, 2))
    yield with_site(b=torch.full_like(factors.b, torch.nan))
    yield with_site(a=torch.full_like(factors.a, -torch.inf))
    yield replace(request, adapters=replace(adapters, sites={site: factors}))
    yield replace(request, adapters=replace(adapters, sites={**adapters.sites, "another": factors}))


@pytest.mark.fault("F25")
def test_a_request_that_does_not_fit_is_refused_before_a_record_is_read(config, request_one):
    node = without_records(config)
    for misfit in misfits(request_one):
        assert reason(node.answer(encode_request(misfit))) == RefusalReason.BAD_REQUEST
    for garbage in (b"", b"\x00" * 64, encode_request(request_one)[:-1]):
        assert reason(node.answer(garbage)) == RefusalReason.BAD_REQUEST
    assert not Path(config.ledger).exists()
    assert reason(node.answer(encode_request(request_one))) == RefusalReason.FAILED  # it looked for them


@pytest.mark.fault("F25", "F47")
def test_code_or_a_base_model_that_the_owner_does_not_accept_is_refused_before_a_record_is_read(
    config, request_one
):
    ours, model, other = code_digest(), weights_digest(config.model.name), "0" * 64

    def asked(accept: dict[str, list[str]], changes: dict[str, str]) -> RefusalReason:
        node = without_records(config.model_copy(update={"accept": Accepted(**accept)}))
        return reason(node.answer(encode_request(replace(request_one, **changes))))

    for accept, changes in (
        ({"code": [other]}, {}),  # neither the node's own code nor the server's was reviewed
        ({"code": [other]}, {"code": other}),  # only the server's
        ({"code": [ours]}, {"code": other}),  # only the node's
        ({"code": [ours]}, {"code": ""}),
        ({"base_model": [other]}, {}),
        ({"base_model": [other]}, {"base_model": other}),
    ):
        assert asked(accept, changes) == RefusalReason.BAD_REQUEST
    assert not Path(config.ledger).exists()
    for accept, changes in (
        ({}, {"code": other}),  # of an owner who pins nothing
        ({"code": [ours, other], "base_model": [other, model]}, {"code": other}),
    ):
        assert asked(accept, changes) == RefusalReason.FAILED  # the records were looked for


@pytest.mark.fault("F25")
def test_a_left_frame_that_does_not_fit_is_refused_before_a_record_is_read(config, request_one):
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"trains": "core"})})
    node, fitting = without_records(config), first_request(config)
    site, factors = next(iter(fitting.adapters.sites.items()))
    for left in (None, torch.full_like(factors.left, torch.nan), factors.left[:-1]):
        sites = {**fitting.adapters.sites, site: replace(factors, left=left)}
        misfit = replace(fitting, adapters=replace(fitting.adapters, sites=sites))
        assert reason(node.answer(encode_request(misfit))) == RefusalReason.BAD_REQUEST
    assert reason(node.answer(encode_request(request_one))) == RefusalReason.BAD_REQUEST  # it sends whole B's
    assert not Path(config.ledger).exists()
    assert reason(node.answer(encode_request(fitting))) == RefusalReason.FAILED  # it looked for them


@pytest.mark.parametrize("side", ["b", "a", "both"])
def test_a_node_that_trains_a_answers_with_what_the_side_trains_and_pays_the_same(config, side):
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"trains": "ab"})})
    asked = first_request(config)
    asked = replace(asked, work=replace(asked.work, side=side))
    reply = decode_reply(DeployedNode(config).answer(encode_request(asked)))
    assert isinstance(reply, ClientUpdate) and debits(config) == 1
    assert bool(reply.delta.sites) == (side != "a") and bool(reply.delta.a) == (side != "b")
    assert all(bool((change != 0).all()) for change in tensors(reply.delta))  # every number bears noise
    assert reply.spent[0].steps == 2


@pytest.mark.fault("F25")
def test_a_base_that_one_side_alone_has_quantised_is_refused_before_a_record_is_read(config, request_one):
    model = config.model.model_copy(update={"quantization": "nf4"})
    node = without_records(config.model_copy(update={"model": model}))
    assert reason(node.answer(encode_request(request_one))) == RefusalReason.BAD_REQUEST
    for digest, expected in (
        (base_digest(model.model_copy(update={"quantization": "int8"})), RefusalReason.BAD_REQUEST),
        (base_digest(model), RefusalReason.FAILED),  # the records were looked for
    ):
        assert reason(node.answer(encode_request(replace(request_one, base_model=digest)))) == expected
    assert not Path(config.ledger).exists()


@pytest.mark.fault("F25")
def test_another_request_for_a_paid_round_is_refused_before_a_record_is_read(config, request_one):
    DeployedNode(config).answer(encode_request(request_one))
    before = Path(config.ledger).read_bytes()
    moved = replace(request_one.adapters, head={n: t + 1 for n, t in request_one.adapters.head.items()})
    for other in (
        replace(request_one, work=LocalWork(steps=1, learning_rate=1.0)),
        replace(request_one, work=LocalWork(steps=2, learning_rate=0.5)),
        replace(request_one, adapters=moved),
    ):
        for kept in (True, False):
            if not kept:
                for path in Path(f"{config.ledger}.outbox").glob("*.reply"):
                    path.unlink()
            assert reason(without_records(config).answer(encode_request(other))) == RefusalReason.BAD_REQUEST
    assert Path(config.ledger).read_bytes() == before


def test_the_ledger_refuses_what_the_budget_does_not_hold(config, request_one):
    node = DeployedNode(config)
    replies = [decode_reply(node.answer(encode_request(replace(request_one, round=n)))) for n in (1, 2, 3)]
    assert [type(reply) for reply in replies] == [ClientUpdate, ClientUpdate, Refusal]
    assert replies[2].reason == RefusalReason.BUDGET
    events = events_of(read_ledger(Path(config.ledger)).debits)
    assert epsilon(events, config.budget.target_delta) <= config.budget.target_epsilon


def test_a_spent_budget_is_refused_before_a_record_is_read_also_by_a_new_process(config, request_one):
    for number in (1, 2):
        DeployedNode(config).answer(encode_request(replace(request_one, round=number)))
    before = Path(config.ledger).read_bytes()
    for run, number in (("r", 3), ("r", 4), ("another", 1)):
        frame = encode_request(replace(request_one, run=run, round=number))
        assert reason(without_records(config).answer(frame)) == RefusalReason.BUDGET
    assert Path(config.ledger).read_bytes() == before


@pytest.mark.fault("F39")
def test_two_processes_of_one_node_cannot_both_take_the_last_participation(config, request_one):
    DeployedNode(config).answer(encode_request(request_one))
    node = DeployedNode(config)
    assert node._node and node._terms  # loaded once; the children inherit them
    children = []
    for number in (2, 3):
        frame = encode_request(replace(request_one, round=number))
        child = os.fork()
        if child == 0:
            said = decode_reply(node.answer(frame))
            os._exit(7 if isinstance(said, ClientUpdate) else 8)
        children.append(child)
    ends = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert ends == [7, 8]
    assert debits(config) == 2


def test_noise_comes_from_the_nodes_own_budget_and_never_falls_below_its_floor(config):
    sampling, mechanism = own_terms(config)
    assert sampling.rate == 16 / 360 and sampling.expected_batch == 16.0
    events = [spent(mechanism, sampling, 2)] * 2
    assert epsilon(events, config.budget.target_delta) <= config.budget.target_epsilon
    floor = config.model_copy(update={"min_noise_multiplier": 9.0})
    assert own_terms(floor)[1].noise_multiplier == 9.0


def test_more_records_than_declared_are_refused_and_fewer_change_nothing(config, request_one):
    more = config.model_copy(update={"declared_records": 359})
    assert reason(DeployedNode(more).answer(encode_request(request_one))) == RefusalReason.FAILED
    assert not Path(config.ledger).exists()
    fewer = config.model_copy(update={"declared_records": 500})
    told = decode_reply(DeployedNode(fewer).answer(encode_request(request_one)))
    assert told.spent[0].sample_rate == 16 / 500 and told.spent[0].expected_batch == 16.0


def test_accuracy_is_told_only_where_the_owner_pays_for_it(config, request_one):
    silent = decode_reply(DeployedNode(config).answer(encode_request(request_one)))
    assert silent.accuracy is None and len(silent.spent) == 1
    (debit,) = read_ledger(Path(config.ledger)).debits
    assert debit.events == silent.spent

    telling = config.model_copy(update={"evaluation_noise": 40.0, "ledger": f"{config.ledger}.2"})
    told = decode_reply(DeployedNode(telling).answer(encode_request(request_one)))
    (debit,) = read_ledger(Path(telling.ledger)).debits
    assert debit.events == told.spent
    assert told.spent[1] == DpEvent(noise_multiplier=40.0, sample_rate=1.0, steps=1)
    assert told.accuracy is not None
    # Paid within the same budget, so training gets more noise.
    assert told.spent[0].noise_multiplier > silent.spent[0].noise_multiplier
    whole = [*told.spent] * config.budget.max_participations
    assert epsilon(whole, config.budget.target_delta) <= config.budget.target_epsilon


def test_two_accountants_agree_on_the_noise_that_is_used_also_where_the_owners_floor_sets_it(
    config, monkeypatch
):
    asked = []
    monkeypatch.setattr("fedlora.deploy.node.agreed_epsilon", lambda events, *_: asked.append(events))
    own_terms(config.model_copy(update={"min_noise_multiplier": 3.0}))
    (events,) = asked
    assert [event.noise_multiplier for event in events] == [3.0] * config.budget.max_participations
    assert sum(event.steps for event in events) == (
        config.budget.max_participations * config.work.local_steps
    )
