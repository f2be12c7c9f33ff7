"""The stock Flower engine runs the same federation, and whatever a node does ends as a reply."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend.backend import Backend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from fedlora.deploy.journal import Journal, Reported
from fedlora.errors import IncompleteError, LedgerError, WireError
from fedlora.federation.events import ClientDone, RoundDone, Stage
from fedlora.runs.evidence import reported
from fedlora.runtime.simulate import resume, simulate
from fedlora.transport.flower_client import Hello, client_app, echo_of, frame_content
from fedlora.transport.flower_cohort import FlowerCohort
from fedlora.transport.flower_nodes import Nodes, meet
from fedlora.transport.wire import decode_request, encode_reply
from fedlora.values import (
    Adapters,
    ClientUpdate,
    Delta,
    DpEvent,
    Factors,
    LocalWork,
    Member,
    Refusal,
    RefusalReason,
    TrainRequest,
    Witness,
)
from tests.deploy.test_journal import SOUNDNESS

SPENT = DpEvent(noise_multiplier=1.5, sample_rate=0.1, steps=2)


def state(run_dir) -> str:
    return json.loads((run_dir / "summary.json").read_text())["state_sha256"]


def test_flower_ends_in_the_state_of_the_local_reference(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # somebody else's cluster, which is not joined
    local = simulate(tiny_config(federation__rounds=2), tmp_path / "local", lambda event: None)
    config = tiny_config(federation__rounds=2, runtime={"kind": "flower", "workers": 1})
    heard = []
    flower = simulate(config, tmp_path / "flower", heard.append)
    assert state(flower) == state(local)
    assert [event.outcome for event in heard if isinstance(event, ClientDone)] == ["answered"] * 4
    assert not (flower / ".flower").exists()


@pytest.mark.slow  # the engine starts twice
def test_an_interrupted_flower_run_is_resumed_to_the_same_state(tiny_config, tmp_path):
    local = simulate(tiny_config(federation__rounds=2), tmp_path / "local", lambda event: None)
    config = tiny_config(federation__rounds=2, runtime={"kind": "flower", "workers": 1})

    def interrupt(event: object) -> None:
        if isinstance(event, RoundDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "flower", interrupt)
    assert not (tmp_path / "flower" / ".flower").exists()
    assert state(resume(tmp_path / "flower", lambda event: None)) == state(local)


@pytest.mark.slow
def test_a_ledger_that_cannot_be_trusted_stops_a_simulated_run(tiny_config, tmp_path):
    config = tiny_config(federation__rounds=1, runtime={"kind": "flower", "workers": 1})
    run_dir = tmp_path / "flower"

    def interrupt(event: object) -> None:
        if isinstance(event, Stage) and "flower" in event.name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, run_dir, interrupt)
    (run_dir / "ledgers").mkdir(exist_ok=True)
    for client in ("client-0", "client-1", "client-2"):
        (run_dir / "ledgers" / f"{client}.jsonl").write_text("no ledger\n")
    with pytest.raises(LedgerError, match="ledgers"):
        resume(run_dir, lambda event: None)


class InThisProcess(Backend):
    """Flower's simulation engine without Ray: ClientApps run in its threads."""

    def __init__(self) -> None:
        super().__init__({})

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        self.app = app_fn()

    @property
    def num_workers(self) -> int:
        return 4

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None: ...

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        return self.app(message, context), context


@contextmanager
def federation(
    answers: list[Callable[[bytes], bytes]],
    names: list[str] | None = None,
    echoes: dict[str, list[Witness | None]] | None = None,
) -> Iterator[Grid]:
    """A grid with a node for each answer; node k is the owner `site-k` unless named otherwise.

    echoes: where each owner's node notes the echo that came with every request.
    """
    names = names or [f"site-{k}" for k in range(len(answers))]

    def greet(context: Context) -> Hello:
        return Hello(client=names[int(context.node_config["partition-id"])], records=10, classes=("a", "b"))

    def answer(context: Context, frame: bytes, echo: Witness | None) -> bytes:
        node = int(context.node_config["partition-id"])
        if echoes is not None:
            echoes.setdefault(names[node], []).append(echo)
        return answers[node](frame)

    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    run = Run.create_empty(run_id=7)
    run.primary_task_id, run.federation_id = 9, NOOP_FEDERATION_ID
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    links = factory.state()
    links.run_ids[7] = RunRecord(run=run)
    links.task_store[9] = Task(task_id=9, run_id=7)
    grid = InMemoryGrid(state_factory=factory, pull_interval=0.01)
    grid.set_run(run)
    nodes = vce_api._register_nodes(len(answers), factory)
    stores = vce_api._register_node_info_stores(nodes, run)
    stop = threading.Event()
    app = client_app(greet, answer)
    arguments = (lambda: app, InThisProcess, nodes, factory, stores, stop, VceMetrics())
    engine = threading.Thread(target=vce_api.run_api, args=arguments, daemon=True)
    engine.start()
    try:
        yield grid
    finally:
        stop.set()
        engine.join(10)


def cohort_of(
    grid: Grid,
    clients: int,
    deadline_s: float = 5.0,
    echo: Callable[[str], Witness | None] = lambda client: None,
) -> FlowerCohort:
    nodes = Nodes(grid, lambda hello: True)
    meet(nodes, lambda hellos: len(hellos) == clients)
    return FlowerCohort(nodes, deadline_s=deadline_s, ttl_s=60.0, listener=lambda event: None, echo=echo)


def request(number: int) -> TrainRequest:
    factors = Factors(a=torch.eye(2, 4), b=torch.zeros(3, 2))
    adapters = Adapters(basis=0, scale=1.0, sites={"layer": factors})
    work = LocalWork(steps=2, learning_rate=0.1)
    return TrainRequest(run="r", base_model="b", code="c", round=number, adapters=adapters, work=work)


def honest(client: str, frame: bytes, spent: tuple[DpEvent, ...] = (SPENT,)) -> bytes:
    asked = decode_request(frame)
    delta = Delta(basis=asked.adapters.basis, sites={"layer": torch.full((3, 2), float(asked.round))})
    update = ClientUpdate(
        client=client,
        run=asked.run,
        round=asked.round,
        delta=delta,
        spent=spent,
        ledger=debit_of(client, asked.round),
    )
    return encode_reply(update)


def debit_of(client: str, number: int) -> Witness:
    return Witness(seq=2 * number - 1, head=f"{client} {number}")


def slow_first(client: str, seconds: float, frame: bytes) -> bytes:
    time.sleep(seconds if decode_request(frame).round == 1 else 0.0)
    return honest(client, frame)


def breaks(frame: bytes) -> bytes:
    raise ValueError("patient 4711 has it")


def test_whatever_a_node_does_ends_as_a_reply_that_bears_its_name(caplog):
    answers = [
        partial(honest, "site-0"),
        breaks,
        lambda frame: b"\x00" * 100,
        partial(honest, "site-0"),  # node 3 speaks in another's name
    ]
    names = ["site-0", "site-1", "site-2", "site-3", "nobody"]
    with federation(answers) as grid:
        replies = {reply.client: reply for reply in cohort_of(grid, 4).ask(names, request(1))}
    assert sorted(replies) == sorted(names)
    assert isinstance(replies.pop("site-0"), ClientUpdate)
    malformed, failed = RefusalReason.MALFORMED, RefusalReason.FAILED
    assert {client: reply.reason for client, reply in replies.items()} == {
        "site-1": failed, "site-2": malformed, "site-3": malformed, "nobody": failed
    }  # fmt: skip
    assert {(reply.run, reply.round) for reply in replies.values()} == {("r", 1)}


def test_an_exceptions_words_are_neither_sent_nor_logged(caplog):
    caplog.set_level(logging.DEBUG)
    from fedlora.transport.flower_client import TRAIN, frame_content
    from fedlora.transport.flower_nodes import pull, push

    with federation([breaks]) as grid:
        (node,) = grid.get_node_ids()
        identifier = push(grid, frame_content(b"frame"), node, TRAIN, 60.0)
        while not (found := pull(grid, [identifier])):
            time.sleep(0.01)
    assert found[0].has_error()
    assert "4711" not in found[0].error.reason
    assert "ValueError in" in caplog.text and "4711" not in caplog.text


def test_a_reply_after_the_deadline_counts_in_a_later_round_and_its_node_is_asked_in_the_next():
    answers = [partial(slow_first, "site-0", 1.5), partial(honest, "site-1")]
    with federation(answers) as grid:
        cohort = cohort_of(grid, 2, deadline_s=0.7)
        first = [(reply.client, reply.round) for reply in cohort.ask(["site-0", "site-1"], request(1))]
        cohort.deadline_s = 5.0
        second = [(reply.client, reply.round) for reply in cohort.ask(["site-0", "site-1"], request(2))]
        third = [(reply.client, reply.round) for reply in cohort.ask(["site-0", "site-1"], request(3))]
    assert first == [("site-1", 1)]
    assert sorted(second) == [
        ("site-0", 1),
        ("site-1", 2),
    ]  # a second update would be paid for and take its place
    assert sorted(third) == [("site-0", 3), ("site-1", 3)]


def test_a_second_node_under_the_name_of_one_that_is_online_is_ignored():
    answers = [partial(honest, "site-0"), partial(honest, "site-0")]
    with federation(answers, names=["site-0", "site-0"]) as grid:
        nodes = Nodes(grid, lambda hello: True)
        meet(nodes, lambda hellos: len(hellos) == 1 and not nodes._asked)
        first = nodes.online()["site-0"]
        assert [nodes.online()["site-0"] for _ in range(3)] == [first] * 3


def test_what_replies_say_they_spent_is_kept_once_a_round_and_nonsense_is_dropped(tmp_path):
    free = partial(honest, "site-1", spent=())
    negative = partial(
        honest, "site-2", spent=(SPENT, DpEvent(noise_multiplier=-1.0, sample_rate=0.1, steps=2))
    )
    with federation([partial(honest, "site-0"), free, negative]) as grid:
        cohort = Reported(cohort_of(grid, 3), Journal(tmp_path / "spent.jsonl"), SOUNDNESS)
        for number in (1, 1, 2):  # a round may be done again after a crash
            replies = list(cohort.ask(["site-0", "site-1", "site-2"], request(number)))
            refused = {reply.client for reply in replies if isinstance(reply, Refusal)}
            assert refused == {"site-1", "site-2"}
    members = [Member(client=f"site-{k}", examples=10) for k in range(3)]
    assert {c: told.events for c, told in reported(tmp_path / "spent.jsonl", members).items()} == {
        "site-0": (SPENT, SPENT),
        "site-1": (),
        "site-2": (),
    }


def test_a_transport_that_cannot_go_on_ends_the_round_at_once():
    def watch(error: object) -> None:
        if error is not None:
            raise IncompleteError("a worker died")

    with federation([breaks]) as grid:
        cohort = cohort_of(grid, 1)
        cohort.watch = watch
        with pytest.raises(IncompleteError):
            list(cohort.ask(["site-0"], request(1)))


def test_a_request_tells_each_node_how_far_its_own_ledger_is_known_to_have_come(tmp_path):
    echoes: dict[str, list[Witness | None]] = {}
    names = ["site-0", "site-1"]
    with federation([partial(honest, name) for name in names], echoes=echoes) as grid:
        for number, asked in ((1, names), (2, names[:1]), (3, names[:1])):
            journal = Journal(tmp_path / "spent.jsonl")  # as after a restart of the server
            cohort = Reported(cohort_of(grid, 2, echo=journal.furthest), journal, SOUNDNESS)
            assert len(list(cohort.ask(asked, request(number)))) == len(asked)
    assert echoes["site-0"] == [None, debit_of("site-0", 1), debit_of("site-0", 2)]
    assert echoes["site-1"] == [None]


@pytest.mark.parametrize("echo", [None, Witness(seq=1, head="a"), Witness(seq=1 << 40, head="f" * 64)])
def test_an_echo_survives_the_journey(echo):
    assert echo_of(frame_content(b"frame", echo)) == echo


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"seq": 1},
        {"seq": "1", "head": "a"},
        {"seq": 1.0, "head": "a"},
        {"seq": 1, "head": b"a"},
        {"seq": -1, "head": "a"},
    ],
)
def test_a_malformed_echo_is_refused(words):
    with pytest.raises(WireError, match="echo"):
        echo_of(RecordDict({"fedlora.echo": ConfigRecord(words)}))
