"""A server that dies at any moment and is started again, real nodes that outlive it, and the judge of what they leave.

Every life of the server is a process forked from this one, and so is every answer of a node, so that both have the
model in memory at once. All of them end, or `violations` waits until they have.
"""

import logging
import os
import select
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import Context

from fedlora.config.node import NodeConfig
from fedlora.config.schema import RunConfig
from fedlora.deploy import server as server_module
from fedlora.deploy.node import DeployedNode
from fedlora.federation.store import Store, state_digest
from fedlora.transport import flower_cohort, flower_nodes
from fedlora.transport.flower_client import Hello, client_app
from fedlora.transport.wire import decode_reply, encode_reply
from fedlora.values import Refusal, RefusalReason
from tests.deploy.nodes import node_config
from tests.faults.grid import App, Tape, Wire
from tests.faults.kills import PARTICIPATIONS
from tests.faults.oracles import is_update, of_ledger, of_rounds, of_summary

LONGEST_S = 120.0
"""No life takes that long; one that does hangs."""

POLL_S = 0.01
"""Of a server that is alone with a handful of nodes."""

CLASSES = ("kitchen", "music", "weather")


def app_of(node: DeployedNode) -> App:
    """The real ClientApp of a node."""
    config = node.config
    hello = Hello(client=config.client, records=config.declared_records, classes=tuple(config.classes))
    return client_app(lambda context: hello, lambda context, frame, echo: node.answer(frame, echo))


def node_of(config: NodeConfig, folder: Path, client: str, loaded: DeployedNode) -> DeployedNode:
    """A node with a ledger of its own that takes model, records and terms from `loaded`."""
    folder.mkdir(parents=True)
    own = config.model_copy(update={"client": client, "ledger": str(folder / "ledger.jsonl")})
    node = DeployedNode(own)
    for name in ("_model", "_examples", "_fingerprint", "_terms"):
        node.__dict__[name] = getattr(loaded, name)
    return node


@dataclass(frozen=True, kw_only=True)
class Life:
    """How a life of the server ended: its exit status, 0 for a run that is finished, and what it raised."""

    status: int
    error: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


@pytest.fixture(scope="module", name="loaded")
def fixture_of_loaded(tiny_encoder, topic_files, tmp_path_factory) -> DeployedNode:
    """A node with everything in memory."""
    config = node_config(tmp_path_factory.mktemp("node"), tiny_encoder, topic_files[0], PARTICIPATIONS)
    node = DeployedNode(config.model_copy(update={"classes": list(CLASSES)}))
    assert len(node._examples) and node._fingerprint and node._model and node._terms
    return node


@pytest.fixture(name="served")
def fixture_of_served(tmp_path, tiny_config, loaded) -> Callable[..., "Served"]:
    """Makes a run in which nobody was asked: two nodes, three rounds, everybody asked in each."""

    def build(clients: int = 2, name: str = "server", **changes: object) -> Served:
        given = {
            "runtime": {"kind": "flower"},
            "data__partition": {"kind": "iid", "clients": clients},
            "method": {"name": "fedsvd", "stale": {"beta": 0.3}},
            "federation__cohort": clients,
            "federation__deadline_s": 60,
            **changes,
        }
        names = [f"site-{number}" for number in range(clients)]
        folder = tmp_path / name
        nodes = {client: node_of(loaded.config, folder / client, client, loaded) for client in names}
        return Served(tiny_config(**given), folder, nodes)

    return build


class Served:
    """A server's run of `config`, in its own folder with everything that is left of it."""

    def __init__(self, config: RunConfig, folder: Path, nodes: Mapping[str, DeployedNode]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config = config.model_copy(update={"output": str(folder / "run")})
        self.folder, self.run_dir = folder, folder / "run"
        self.nodes = {number: nodes[name] for number, name in enumerate(sorted(nodes), 1)}
        apps = {number: app_of(node) for number, node in self.nodes.items()}
        self.wire = Wire(nodes=apps, folder=folder, apart=True)
        self._families: list[int] = []

    @property
    def tape(self) -> Tape:
        return self.wire.tape

    def live(
        self,
        *,
        prepare: Callable[[], object] = lambda: None,
        kill_after: float | None = None,
        kill_when: Callable[[], bool] = lambda: False,
    ) -> Life:
        """The server runs until it ends, or is killed after so many seconds or once that is true.

        prepare: is called in its process first.
        """
        read, write = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os._exit(self._serve(prepare))
        os.close(write)
        self._families.append(read)
        _watch(child, began, kill_after, kill_when)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = self.folder / "error"
        error = said.read_text() if said.exists() else ""
        said.unlink(missing_ok=True)
        return Life(status=status, error=error, seconds=time.monotonic() - began)

    def settle(self) -> None:
        """Every process of every life is gone: each has the end of a pipe that nobody closes."""
        for family in self._families:
            assert select.select([family], [], [], LONGEST_S)[0], "a process of a node does not end"
            os.close(family)
        self._families.clear()

    def _serve(self, prepare: Callable[[], object]) -> int:
        try:
            log = os.open(self.folder / "server.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            logging.basicConfig(level=logging.INFO, force=True)
            flower_cohort.POLL_S = flower_nodes.POLL_S = POLL_S
            prepare()
            server_module.serve(self.wire, self.config)
        except BaseException as error:
            (self.folder / "error").write_text(f"{type(error).__name__}: {error}")
            return 1
        return 0

    def state(self) -> str:
        """`state_sha256` of the newest checkpoint."""
        return state_digest(Store(self.run_dir).load()[0])

    def updates(self) -> dict[tuple[int, int], set[bytes]]:
        """By node and round, the frames of all updates that left a node."""
        found: dict[tuple[int, int], set[bytes]] = {}
        for said in self.tape.read("said"):
            if is_update(said):
                found.setdefault((said.node, said.round), set()).add(said.frame)
        return found

    def undisturbed(self, absent: Collection[tuple[int, int]] = ()) -> str:
        """`state_sha256` of a run in which nobody died and every request got the reply that it got here.

        absent: by node and round, who refuses instead.
        """
        self.settle()
        calm = Served(self.config, self.folder / "undisturbed", {})
        calm.run_dir.mkdir()
        shutil.copy2(self.run_dir / "roster.json", calm.run_dir)
        calm.wire = Wire(nodes={n: self._again(n, absent) for n in self.nodes}, folder=calm.folder)
        life = calm.live()
        assert life.status == 0, life.error
        calm.settle()
        return calm.state()

    def _again(self, number: int, absent: Collection[tuple[int, int]]) -> App:
        """A node that answers each request with the bytes of the tape."""
        config = self.nodes[number].config
        asked = {a.frame: a.round for a in self.tape.read("asked") if a.node == number}
        (updates,) = [{r: frames for (n, r), frames in self.updates().items() if n == number}]
        hello = Hello(client=config.client, records=config.declared_records, classes=tuple(config.classes))

        def answer(context: Context, frame: bytes, echo: object) -> bytes:
            round_ = asked[frame]  # a request that was never made is a KeyError, so an error here
            (reply,) = updates[round_]
            if (number, round_) not in absent:
                return reply
            told = decode_reply(reply)
            return encode_reply(
                Refusal(client=told.client, run=told.run, round=round_, reason=RefusalReason.FAILED)
            )

        return client_app(lambda context: hello, answer)

    def violations(self) -> list[str]:
        """Every promise that the directory, the ledgers and the tape break, once all is at rest."""
        self.settle()
        found = of_rounds(self.run_dir, self.config.federation.rounds)
        found += of_summary(self.run_dir, self.config, [node.config.client for node in self.nodes.values()])
        asked = {(a.round, a.frame) for a in self.tape.read("asked") if a.round}
        twice = [number for number, count in Counter(round_ for round_, _ in asked).items() if count > 1]
        found += [f"round {number} was asked in two ways" for number in sorted(twice)]
        updates = self.updates()
        found += [f"{key} was released {len(u)} times" for key, u in updates.items() if len(u) > 1]
        for number, node in self.nodes.items():
            frames = {frame for (n, _), known in updates.items() if n == number for frame in known}
            found += of_ledger(node.config, frames)
        return found


def _watch(child: int, began: float, kill_after: float | None, kill_when: Callable[[], bool]) -> None:
    """Returns when the process has ended, by itself or killed."""
    ends, handle = began + (LONGEST_S if kill_after is None else kill_after), os.pidfd_open(child)
    try:
        while not select.select([handle], [], [], 0.002)[0]:
            if time.monotonic() >= ends or kill_when():
                os.kill(child, signal.SIGKILL)
                select.select([handle], [], [])
                assert kill_after is not None or time.monotonic() < ends, "the server hangs"
                return
    finally:
        os.close(handle)
