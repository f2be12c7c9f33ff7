"""Who is taken for which client, and what a cohort does about messages that Flower loses."""

import logging
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedlora.errors import WireError
from fedlora.transport import FRAME_VERSION, flower_cohort, flower_nodes
from fedlora.transport.flower_client import Hello, client_app, hello_content, hello_of
from fedlora.transport.flower_cohort import FlowerCohort
from fedlora.transport.flower_nodes import Nodes, meet
from fedlora.transport.wire import decode_request, encode_reply
from fedlora.values import (
    Adapters,
    ClientUpdate,
    Delta,
    Factors,
    LocalWork,
    Refusal,
    RefusalReason,
    TrainRequest,
    Witness,
)
from tests.faults.grid import App, Wire, fails, instead, is_lost

NODE_UNAVAILABLE, APP_CRASHED = ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED
MESSAGE_GONE = ErrorCode.MESSAGE_UNAVAILABLE


def app_of(client: str) -> App:
    """Answers with an update that is the number of its round."""

    def answer(context: object, frame: bytes, echo: Witness | None) -> bytes:
        asked = decode_request(frame)
        delta = Delta(basis=0, sites={"layer": torch.full((3, 2), float(asked.round))})
        paid = Witness(seq=asked.round, head="h")
        return encode_reply(
            ClientUpdate(client=client, run=asked.run, round=asked.round, delta=delta, spent=(), ledger=paid)
        )

    return client_app(lambda context: Hello(client=client, records=9, classes=("a", "b")), answer)


def request(number: int) -> TrainRequest:
    adapters = Adapters(basis=0, scale=1.0, sites={"layer": Factors(a=torch.eye(2, 4), b=torch.zeros(3, 2))})
    work = LocalWork(steps=2, learning_rate=0.1)
    return TrainRequest(run="r", base_model="b", code="c", round=number, adapters=adapters, work=work)


@pytest.fixture
def wire(tmp_path, monkeypatch) -> Callable[..., Wire]:
    """A grid of nodes by name; waits are short."""
    monkeypatch.setattr(flower_cohort, "AGAIN_S", 0.05)
    monkeypatch.setattr(flower_cohort, "RETURN_S", 1.0)
    monkeypatch.setattr(flower_nodes, "AGAIN_S", 0.05)
    monkeypatch.setattr(flower_nodes, "GREET_AGAIN_S", 0.05)

    def build(*clients: str, names: Mapping[int, str] | None = None, **more) -> Wire:
        nodes = {number: app_of(client) for number, client in enumerate(clients, 1)}
        return Wire(nodes=nodes, folder=Path(tmp_path), names=names or {}, **more)

    return build


def cohort_of(wire: Wire, clients: int, asks: int = 3, deadline_s: float = 20.0) -> FlowerCohort:
    nodes = Nodes(wire, lambda hello: True)
    meet(nodes, lambda hellos: len(hellos) == clients)
    return FlowerCohort(nodes, deadline_s=deadline_s, ttl_s=60.0, listener=lambda event: None, asks=asks)


def outcomes(cohort: FlowerCohort, *clients: str) -> dict[str, str]:
    replies = list(cohort.ask(clients, request(1)))
    assert len({reply.client for reply in replies}) == len(replies)
    return {
        reply.client: reply.reason.value if isinstance(reply, Refusal) else "answered" for reply in replies
    }


@pytest.mark.parametrize("code", [NODE_UNAVAILABLE, APP_CRASHED, MESSAGE_GONE])
@pytest.mark.fault("F1", "F17")
def test_a_client_whose_message_was_lost_is_asked_again_in_the_same_round(wire, code):
    grid = wire("a", "b")
    grid.fates[1, 1] = lambda asked, reply: [*fails(code)(asked, reply)] if first(grid) else [reply]
    assert outcomes(cohort_of(grid, 2), "a", "b") == {"a": "answered", "b": "answered"}
    assert [heard.node for heard in grid.tape.read("asked") if heard.round == 1].count(1) == 2


def first(grid: Wire) -> bool:
    """Whether node 1 was asked for round 1 only once so far."""
    return [heard.node for heard in grid.tape.read("asked") if heard.round == 1].count(1) == 1


@pytest.mark.parametrize("asks", [1, 3])
def test_a_client_whose_every_message_is_lost_is_asked_so_often_and_no_more(wire, asks):
    grid = wire("a")
    grid.fates[1, 1] = fails(APP_CRASHED)
    assert outcomes(cohort_of(grid, 1, asks), "a") == {"a": "failed"}
    assert len([heard for heard in grid.tape.read("asked") if heard.round == 1]) == asks


def test_a_client_that_was_lost_is_waited_for_until_it_is_back(wire):
    looks: list[bool] = []
    grid = wire("a", awake=lambda node: not looks or looks.append(True) or len(looks) > 5)

    def dies(asked, reply):
        if looks:
            return [reply]
        looks.append(True)
        return fails(NODE_UNAVAILABLE)(asked, reply)

    grid.fates[1, 1] = dies
    assert outcomes(cohort_of(grid, 1), "a") == {"a": "answered"}


def test_a_client_that_stays_away_is_waited_for_no_longer_than_it_takes_to_come_back(wire, monkeypatch):
    gone: list[bool] = []
    grid = wire("a", "b", awake=lambda node: node != 1 or not gone)
    grid.fates[1, 1] = lambda asked, reply: (gone.append(True), fails(NODE_UNAVAILABLE)(asked, reply))[1]
    cohort = cohort_of(grid, 2)
    assert outcomes(cohort, "a", "b") == {"a": "failed", "b": "answered"}
    # Whoever is away when a round begins is not waited for at all.
    monkeypatch.setattr(flower_cohort, "RETURN_S", 60.0)
    began = time.monotonic()
    assert [reply.client for reply in cohort.ask(["a"], request(2))] == ["a"]
    assert time.monotonic() - began < 30


def test_a_lost_client_is_not_asked_again_after_the_deadline(wire, monkeypatch):
    monkeypatch.setattr(flower_cohort, "AGAIN_S", 60.0)
    grid = wire("a")
    grid.fates[1, 1] = fails(APP_CRASHED)
    list(cohort_of(grid, 1, deadline_s=0.5).ask(["a"], request(1)))
    assert len([heard for heard in grid.tape.read("asked") if heard.round == 1]) == 1


def test_whoever_leaves_after_a_reply_gets_what_was_pulled_with_it_in_the_next_round(wire):
    grid = wire("a", "b", "c")
    cohort = cohort_of(grid, 3)
    grid.holds[3, 1] = lambda: len(grid.tape.read("said")) > 6  # not before round 2 is under way
    first = next(iter(cohort.ask(["a", "b", "c"], request(1))))
    assert first.client == "a"
    second = [(reply.client, reply.round) for reply in cohort.ask(["a", "b", "c"], request(2))]
    # b's came with a's and was kept; c's was under way: neither is asked again for as long as that is to count.
    assert sorted(second) == [("a", 2), ("b", 1), ("c", 1)]


@pytest.mark.parametrize("frame", [b"", b"\x00" * 100])
@pytest.mark.fault("F26")
def test_bytes_that_are_no_reply_are_refused_as_malformed_and_not_asked_for_again(wire, frame):
    grid = wire("a")
    grid.fates[1, 1] = instead(frame)
    assert outcomes(cohort_of(grid, 1), "a") == {"a": RefusalReason.MALFORMED}
    assert len([heard for heard in grid.tape.read("asked") if heard.round == 1]) == 1


def test_a_message_that_never_arrives_is_waited_for_until_the_deadline(wire):
    grid = wire("a", "b")
    grid.fates[1, 1] = is_lost
    assert outcomes(cohort_of(grid, 2, deadline_s=0.5), "a", "b") == {"b": "answered"}


@pytest.mark.fault("F1", "F17")
def test_a_client_whose_message_was_lost_without_a_word_is_asked_once_more_before_the_deadline(wire):
    grid = wire("a", "b")
    grid.fates[1, 1] = lambda asked, reply: [] if first(grid) else [reply]
    assert outcomes(cohort_of(grid, 2, deadline_s=4.0), "a", "b") == {"a": "answered", "b": "answered"}
    assert [heard.node for heard in grid.tape.read("asked") if heard.round == 1].count(1) == 2


def test_a_client_that_was_silent_in_one_round_is_asked_in_the_next_all_the_same(wire):
    grid = wire("a")
    grid.fates[1, 1] = is_lost
    cohort = cohort_of(grid, 1, deadline_s=0.6)
    assert list(cohort.ask(["a"], request(1))) == []
    cohort.deadline_s = 4.0
    assert [(reply.client, reply.round) for reply in cohort.ask(["a"], request(2))] == [("a", 2)]


def test_two_answers_of_one_client_are_heard_once(wire):
    grid = wire("a", "b")
    grid.holds[1, 1] = lambda: len([h for h in grid.tape.read("asked") if (h.node, h.round) == (1, 1)]) == 2
    assert outcomes(cohort_of(grid, 2, deadline_s=4.0), "a", "b") == {"a": "answered", "b": "answered"}


def refuses(number: int) -> bytes:
    """The frame of a refusal by a, for a round that it may name as it likes."""
    return encode_reply(Refusal(client="a", run="r", round=number, reason=RefusalReason.NO_DATA))


def asked_twice(grid: Wire) -> bool:
    return [heard.node for heard in grid.tape.read("asked") if heard.round == 1].count(1) == 2


@pytest.mark.parametrize("last", ["answered", "no_data"])
def test_a_client_that_was_asked_twice_replies_once_and_its_update_comes_before_its_refusal(wire, last):
    grid = wire("a", "b")
    grid.holds[1, 1] = lambda: asked_twice(grid)
    said = iter(
        [instead(refuses(1)), instead(refuses(1)) if last == "no_data" else lambda asked, reply: [reply]]
    )
    grid.fates[1, 1] = lambda asked, reply: next(said)(asked, reply)
    cohort = cohort_of(grid, 2, deadline_s=4.0)
    assert outcomes(cohort, "a", "b") == {"a": last, "b": "answered"}
    assert [(reply.client, reply.round) for reply in cohort.ask(["a", "b"], request(2))] == [
        ("a", 2),
        ("b", 2),
    ]


def test_a_refusal_whose_other_message_stays_silent_is_told_at_the_deadline(wire):
    grid = wire("a", "b")
    said = iter([is_lost, instead(refuses(1)), is_lost])
    grid.fates[1, 1] = lambda asked, reply: next(said)(asked, reply)
    assert outcomes(cohort_of(grid, 2, deadline_s=0.6), "a", "b") == {"a": "no_data", "b": "answered"}
    assert asked_twice(grid)


def test_a_late_refusal_does_not_pass_for_one_of_this_round(wire):
    grid = wire("a", "b")
    grid.fates[1, 1] = instead(refuses(2))
    grid.holds[1, 1] = lambda: any(heard.round == 2 for heard in grid.tape.read("asked"))
    cohort = cohort_of(grid, 2, asks=1, deadline_s=0.5)
    assert [reply.client for reply in cohort.ask(["a", "b"], request(1))] == ["b"]
    found = [(reply.client, reply.round) for reply in cohort.ask(["a", "b"], request(2))]
    assert sorted(found) == [("a", 1), ("a", 2), ("b", 2)]


@pytest.mark.fault("F43")
def test_a_node_is_the_client_that_its_registered_key_is_named_after_or_nobody(wire, caplog):
    caplog.set_level(logging.WARNING)
    grid = wire("a", "a", names={1: "b", 2: "a"})  # node 1 has b's key
    nodes = Nodes(grid, lambda hello: True)
    meet(nodes, lambda hellos: bool(hellos) and not nodes._asked)
    assert nodes.online() == {"a": 2}
    assert "the node with the key of 'b' says it is 'a'; it is ignored: write client: b" in caplog.text


def test_a_node_that_was_refused_is_greeted_again_since_it_may_have_been_mended(wire):
    grid, seen = wire("a"), count()
    meet(Nodes(grid, lambda hello: next(seen) >= 2), lambda hellos: "a" in hellos)
    assert len(grid.tape.read("asked")) == 3


def test_a_hello_survives_the_journey():
    hello = Hello(client="a", records=3, classes=("x", "y"))
    assert hello_of(hello_content(hello)) == hello


@pytest.mark.fault("F47")
@pytest.mark.parametrize("wire_version", [FRAME_VERSION - 1, FRAME_VERSION + 1, None, "2"])
def test_a_hello_of_another_version_is_refused_with_both_named(wire_version):
    words = dict(hello_content(Hello(client="a", records=3, classes=("x",)))["fedlora"])
    words |= {"version": "9.9", "wire": wire_version}
    if wire_version is None:
        del words["wire"]
    with pytest.raises(
        WireError, match=rf"fedlora '9.9' with frames.*but here is fedlora .* with version {FRAME_VERSION}"
    ):
        hello_of(RecordDict({"fedlora": ConfigRecord(words)}))
