"""Clients that go on from their own B: what they work on, what it costs, and what the server's B has to say in it."""

from dataclasses import replace

import pytest
import torch

from fedlora.algebra.deltas import tensors
from fedlora.errors import ConfigError, PrivacyError
from fedlora.federation.work import work
from fedlora.privacy.ledger import read_ledger
from fedlora.runs.rundir import PERSONAL
from fedlora.runtime.host import Host, ledger_path
from fedlora.runtime.prepare import prepare
from fedlora.training.client import train
from fedlora.training.personal import OwnB
from fedlora.training.tasks import record_accuracies
from fedlora.training.together import train_together
from fedlora.transport.wire import encode_reply
from fedlora.values import ClientUpdate, RefusalReason, TrainRequest

ONE, OTHER = "client-0", "client-1"


class Clients:
    """A host in a directory of its own, and requests of its run."""

    def __init__(self, config, run_dir, model=None):
        self.prepared = prepare(config, lambda event: None)
        run_dir.mkdir()
        self.host = Host(self.prepared.save_for_hosts(run_dir), model)
        self.run_dir = run_dir

    def request(self, number: int, b: float | None = None, **changes) -> TrainRequest:
        """b: what every number of the server's B is; None: zero. changes: of the work."""
        origin, config = self.prepared.origin, self.prepared.config
        adapters = self.prepared.first_state().adapters
        if b is not None:
            sites = {site: replace(f, b=torch.full_like(f.b, b)) for site, f in adapters.sites.items()}
            adapters = replace(adapters, sites=sites)
        asked = replace(work(number, config.federation, self.prepared.method), **changes)
        return TrainRequest(
            run=origin.run, base_model=origin.base_model, code=origin.code, round=number,
            adapters=adapters, work=asked,
        )  # fmt: skip

    def reply(self, request: TrainRequest, client: str = ONE) -> ClientUpdate:
        (found,) = self.host.answer([client], request)
        assert isinstance(found, ClientUpdate)
        return found

    def debits(self, client: str = ONE):
        path = ledger_path(self.run_dir, client)
        return read_ledger(path).debits if path.exists() else ()


@pytest.fixture
def clients(tiny_config, tmp_path):
    def build(place="run", **changes) -> Clients:
        named = {"lora__trains": "ab", "method": {"name": "fedsa"}, **changes}
        return Clients(tiny_config(**named), tmp_path / place)

    return build


def same(one, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(one), tensors(other), strict=True))


def test_each_round_is_that_of_a_client_who_was_sent_its_own_b(clients):
    """To the last bit: what is clipped, noised, sent and paid is what it is without a B of one's own."""
    own, sent = clients(), clients("sent")
    b = None
    for number in (1, 2, 3):
        plain = sent.request(number, own_b=False)
        if b is not None:
            sites = {site: replace(f, b=b[site]) for site, f in plain.adapters.sites.items()}
            plain = replace(plain, adapters=replace(plain.adapters, sites=sites))
        got, wanted = own.reply(own.request(number, b=0.1 * number)), sent.reply(plain)
        assert same(got.delta, wanted.delta) and got.spent == wanted.spent
        assert all(bool((change != 0).all()) for change in tensors(got.delta))  # every number bears noise
        b = {site: f.b.detach().clone() for site, f in _live(sent).items()}
    assert [debit.events for debit in own.debits()] == [debit.events for debit in sent.debits()]
    assert len(own.debits()) == 3


def _live(clients: Clients):
    """The factors that the model of a host has now: those that its last client left."""
    adapters = clients.prepared.first_state().adapters
    return {site: replace(adapters.sites[site], b=b) for site, (_, b) in clients.host.model.live.items()}


def test_the_servers_b_plays_no_part_and_nobody_gets_anothers(clients):
    one, other = clients(), clients("other")
    for number, b in ((1, None), (2, 0.5)):
        first, second = one.reply(one.request(number)), other.reply(other.request(number, b=b))
        assert same(first.delta, second.delta)
    fresh, alone = one.reply(one.request(3), OTHER), clients("alone")
    assert same(fresh.delta, alone.reply(alone.request(3), OTHER).delta)  # its own begins at zero


def test_the_same_request_gets_the_same_bytes_also_from_a_new_process_and_is_debited_once(clients):
    one = clients()
    first = encode_reply(one.reply(one.request(1)))
    second = one.request(2)
    replies = [encode_reply(one.reply(second)) for _ in range(2)]
    one.host = Host(one.host.setup)
    replies.append(encode_reply(one.reply(second)))
    assert len(set(replies)) == 1 and len(one.debits()) == 2
    assert (
        encode_reply(one.reply(one.request(1))) == first
    )  # as a server does whose last checkpoints are lost
    assert encode_reply(one.reply(second)) == replies[0] and len(one.debits()) == 2


def test_another_request_for_a_paid_round_is_refused_though_only_a_b_differs_that_nobody_reads(clients):
    one = clients()
    one.reply(one.request(1))
    (refused,) = one.host.answer([ONE], one.request(1, b=1.0))
    assert refused.reason == RefusalReason.BAD_REQUEST and len(one.debits()) == 1


def test_work_that_was_paid_is_not_done_again_on_another_b(clients):
    """Under seeded noise it would be a second release with the same noise, and its debit is there already."""
    one = clients()
    for number in (1, 2):
        one.reply(one.request(number))
    for path in (one.run_dir / PERSONAL / ONE).iterdir():
        path.unlink()
    (refused,) = one.host.answer([ONE], one.request(2))
    assert refused.reason == RefusalReason.BAD_REQUEST and len(one.debits()) == 2


def test_a_damaged_b_is_the_owner_s_to_hear_and_costs_nothing(clients, caplog):
    one = clients()
    one.reply(one.request(1))
    (path,) = (one.run_dir / PERSONAL / ONE).iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"{path} is damaged"):
        one.host.answer([OTHER, ONE], one.request(2))
    assert len(one.debits()) == 1 and caplog.text == ""


def test_an_accuracy_is_told_of_the_clients_own_model(clients):
    """Under equal noise what is told differs by as many records as the two models do."""
    told, right = [], []
    for own_b in (True, False):
        one = clients("own" if own_b else "sent", task__head="frozen")
        node = replace(one.host._node(ONE), evaluation_noise=100.0)
        request, draw = one.request(2, own_b=own_b), torch.Generator().manual_seed(3)
        sites = {
            site: 3 * torch.randn(f.b.shape, generator=draw) for site, f in request.adapters.sites.items()
        }
        node.personal.keep(request.run, OwnB(round=1, began=0, sites=sites))
        told.append(train(node, request, one.host._ledger(node)).accuracy * node.declared_records)
        one.host.model.load(node.personal.start(request).request.adapters if own_b else request.adapters)
        right.append(float(record_accuracies(one.host.model, node.examples).sum()))
        assert [len(debit.events) for debit in one.debits()] == [2]
    assert told[0] - told[1] == pytest.approx(right[0] - right[1], abs=1e-3) and right[0] != right[1]


def test_who_keeps_no_b_refuses_before_it_pays(clients):
    one = clients()
    node = replace(one.host._node(ONE), personal=None)
    reply = train(node, one.request(1), one.host._ledger(node))
    assert reply.reason == RefusalReason.BAD_REQUEST and not one.debits()


def test_clients_with_their_own_b_share_no_forward_pass(clients):
    one = clients(lora__trains="b", method={"name": "ffa"})
    nodes = [one.host._node(client) for client in (ONE, OTHER)]
    request = one.request(1, own_b=True)
    with pytest.raises(
        PrivacyError, match="2 clients together: a B of each client's own; train them one by one"
    ):
        train_together(nodes, request, [one.host._ledger(node) for node in nodes])
    assert not one.debits() and not one.debits(OTHER)
