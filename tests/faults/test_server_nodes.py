"""Nodes that go, come back, come late or say what they should not, and what of it counts in the server's model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from torch import Tensor

from fedlora.disk import whole_lines
from fedlora.federation.store import Store
from fedlora.runs.rundir import SPENT
from fedlora.transport.flower_client import frame_content, frame_of
from fedlora.transport.wire import decode_reply, decode_request, encode_reply
from fedlora.values import Adapters, ClientUpdate
from tests.faults.grid import App, Fate, arrives_twice, round_of
from tests.faults.kills import die
from tests.faults.server import Served, app_of, fixture_of_loaded, fixture_of_served
from tests.faults.test_server import asked, finished, left
from tests.lanes import mostly_slow

loaded, served = fixture_of_loaded, fixture_of_served

DEADLINE_S = 12.0
"""Many times what a round of nodes who are there takes, also on a busy machine."""


def away(run: Served, node: int) -> Path:
    """While this exists, the node cannot be reached."""
    return run.folder / f"node {node} is away"


def dies_in(run: Served, number: int, *nodes: int) -> None:
    """The processes of these nodes are gone when they are asked for that round, and nobody starts them again."""

    def dying(node: int, app: App) -> App:
        def answer(message: Message, context: Any) -> Message:
            if round_of(message) == number:
                away(run, node).touch()
                die()
            return app(message, context)

        return answer

    apps = {node: app_of(real) for node, real in run.nodes.items()}
    run.wire.nodes = {node: dying(node, app) if node in nodes else app for node, app in apps.items()}
    run.wire.awake = lambda node: not away(run, node).exists()


def line(run: Served, number: int) -> dict[str, Any]:
    """Of rounds.jsonl."""
    return whole_lines(run.run_dir / "rounds.jsonl")[number]


def models(run: Served) -> list[Adapters]:
    """After each round, from the first state on: what the next request carried, and the last checkpoint."""
    sent = {
        found.round: decode_request(found.frame).adapters for found in run.tape.read("asked") if found.round
    }
    return [*(sent[number] for number in sorted(sent)), Store(run.run_dir).load()[0].adapters]


def update(run: Served, node: int, number: int) -> ClientUpdate:
    """What left the node in that round."""
    (frame,) = run.updates()[node, number]
    reply = decode_reply(frame)
    assert isinstance(reply, ClientUpdate)
    return reply


def far(found: Tensor, wanted: Tensor) -> float:
    """Their distance, in units of what was wanted."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.slow
@pytest.mark.fault("F12")
def test_a_client_that_never_comes_back_is_carried_by_its_last_update(served):
    run = served(method={"name": "ffa", "stale": {"beta": 0.3}}, federation__deadline_s=DEADLINE_S)
    dies_in(run, 2, 2)
    life = run.live()
    assert life.status == 0, life.error
    assert run.violations() == []
    assert [line(run, number)["answered"] for number in (1, 2, 3)] == [
        ["site-0", "site-1"],
        ["site-0"],
        ["site-0"],
    ]
    before, after = models(run)[1:3]
    mine, its = (update(run, node, 1).delta for node in (1, 2))
    fresh = update(run, 1, 2).delta
    for site, factors in before.sites.items():
        # Shares of those who answered sum to 1; the memory has each client's last update, by half of all examples.
        memory = (mine.sites[site] + its.sites[site]) / 2
        step = fresh.sites[site] - 0.3 * mine.sites[site] + 0.3 * memory
        moved = after.sites[site].b - factors.b
        assert far(moved, step) < 1e-4
        assert (
            far(moved, step - 0.15 * its.sites[site]) > 1e-2
        )  # nor would it be the same without the absent one


@pytest.mark.slow
@pytest.mark.fault("F13")
def test_a_run_whose_clients_are_all_gone_stops_whole_and_goes_on_when_one_returns(served):
    run = served(federation__deadline_s=DEADLINE_S)
    dies_in(run, 2, 1, 2)
    life = run.live()
    assert life.status == 1 and life.error.startswith("IncompleteError") and "min_clients is 1" in life.error
    assert left(run) == (2, 2, 1, 1, False)
    before = run.state()
    # Nobody there: it waits and changes nothing.
    assert run.live(kill_after=DEADLINE_S + 2).killed
    assert run.state() == before and left(run) == (2, 2, 1, 1, False)
    away(run, 1).unlink()
    dies_in(run, 2)
    life = run.live()
    assert life.status == 0, life.error
    assert run.violations() == []
    assert [line(run, number)["answered"] for number in (1, 2, 3)] == [
        ["site-0", "site-1"],
        ["site-0"],
        ["site-0"],
    ]


@pytest.mark.slow
@pytest.mark.fault("F16")
def test_a_reply_after_the_deadline_counts_in_a_later_round_in_the_basis_that_it_was_trained_in(served):
    run = served(method={"name": "fedsvd"}, federation__rounds=2, federation__deadline_s=DEADLINE_S)
    run.wire.holds[2, 1] = lambda: (1, 2) in asked(run)
    run.wire.holds[2, 2] = lambda: False
    life = run.live()
    assert life.status == 0, life.error
    assert run.violations() == []
    assert [line(run, number)["answered"] for number in (1, 2)] == [["site-0"], ["site-0", "site-1"]]
    late = [e for e in whole_lines(run.run_dir / SPENT) if e["client"] == "site-1"]
    assert [(entry["round"], entry["heard"]) for entry in late] == [(1, 2)]
    assert Store(run.run_dir).load()[0].remembered == {"site-0": 2, "site-1": 1}
    first, second, last = models(run)
    mine, its = update(run, 1, 2).delta, update(run, 2, 1).delta
    assert (mine.basis, its.basis) == (second.basis, first.basis)
    for site in first.sites:
        a0, a1 = first.sites[site].a, second.sites[site].a
        moved = last.sites[site].b @ last.sites[site].a - second.sites[site].b @ a1
        step = (mine.sites[site] @ a1 + its.sites[site] @ a0) / 2
        assert far(moved, step) < 1e-4
        assert (
            far(moved, (mine.sites[site] + its.sites[site]) @ a1 / 2) > 1e-2
        )  # as if it were of the wrong round


def says_again(run: Served, node: int, number: int) -> Fate:
    """The bytes that left the node in that round."""

    def fate(asked: Message, reply: Message) -> list[Message]:
        (frame,) = run.updates()[node, number]
        return [Message(frame_content(frame), reply_to=asked)]

    return fate


def says(**words: Any) -> Fate:
    """Its own update, with other words about itself."""

    def fate(asked: Message, reply: Message) -> list[Message]:
        own = decode_reply(frame_of(reply.content))
        return [Message(frame_content(encode_reply(replace(own, **words))), reply_to=asked)]

    return fate


@pytest.mark.fault("F21")
def test_a_reply_that_arrives_twice_counts_once(served):
    run = served()
    run.wire.fates |= {(node, number): arrives_twice for node in run.nodes for number in (1, 2, 3)}
    life = run.live()
    assert life.status == 0, life.error
    assert finished(run) == []


FALSE: dict[str, Callable[[Served], Fate]] = {
    "the same bytes as in the round before": lambda run: says_again(run, 1, 1),
    "an old round": lambda run: says(round=1),
    "a round that is still to come": lambda run: says(round=3),
    "a round that will never be": lambda run: says(round=99),
    "round 0": lambda run: says(round=0),
    "another run": lambda run: says(run="another"),
    "no run": lambda run: says(run=""),
    "another client's name": lambda run: says(client="site-1"),
    "nobody's name": lambda run: says(client="nobody"),
}


@pytest.mark.fault("F21", "F23")
@pytest.mark.parametrize("what", mostly_slow(FALSE, "an old round", "another run", "another client's name"))
def test_a_reply_that_is_not_what_was_asked_for_is_refused_and_the_run_goes_on_without_it(served, what):
    run = served()
    run.wire.fates[1, 2] = FALSE[what](run)
    life = run.live()
    assert life.status == 0, life.error
    assert run.violations() == []
    second = line(run, 2)
    assert second["answered"] == ["site-1"] and "site-0" in {**second["refused"], **second["rejected"]}
    assert line(run, 1)["answered"] == ["site-0", "site-1"] and "site-1" in line(run, 3)["answered"]
    numbers = {node.config.client: number for number, node in run.nodes.items()}
    counted = {(numbers[c], number) for number in (1, 2, 3) for c in line(run, number)["answered"]}
    assert run.undisturbed(absent=run.updates().keys() - counted) == run.state()


@pytest.mark.fault("F16")
def test_a_round_ends_with_the_first_few_that_count_and_what_the_rest_said_counts_later(served):
    run = served(federation__enough=1)
    life = run.live()
    assert life.status == 0, life.error
    assert run.violations() == []
    lines = [line for line in whole_lines(run.run_dir / "rounds.jsonl") if line["round"]]
    assert {len(line["answered"]) for line in lines} == {1}
    heard = whole_lines(run.run_dir / SPENT)
    assert len(heard) == len(lines) and {line["client"] for line in heard} == {"site-0", "site-1"}


@pytest.mark.fault("F16")
def test_what_does_not_count_is_not_enough_also_after_a_restart(served):
    """A reply that is rejected must not end a round, or the same one would end it again at every start."""
    run = served(federation__enough=1)
    run.wire.fates[1, 2] = stale_first
    life = run.live()
    assert life.status == 0, life.error
    assert run.violations() == []


def stale_first(asked: Message, reply: Message) -> list[Message]:
    """In the reply's place one that says it is of a basis that never was, though all else of it is right."""
    told = decode_reply(frame_of(reply.content))
    assert isinstance(told, ClientUpdate)
    never = replace(told, delta=replace(told.delta, basis=40))
    return [Message(frame_content(encode_reply(never)), reply_to=asked)]
