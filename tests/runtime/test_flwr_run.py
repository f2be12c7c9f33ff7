"""`flwr run .` is a whole simulation: Flower's engine, our two apps, the state that `fedlora simulate` ends in."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.server.superlink.fleet.vce.backend.backend import Backend
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import EventType

from fedlora.config.data import Dirichlet
from fedlora.config.load import dump_config, load_config
from fedlora.deploy.grid import PromptGrid
from fedlora.errors import ConfigError
from fedlora.federation.events import RoundDone
from fedlora.runtime.flwr_run import answer, greet, named, simulate_on
from fedlora.runtime.simulate import simulate

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CLOUD = re.compile(rb"GET http://(169\.254\.169\.254|metadata\.google\.internal)/")
"""Where Ray's dashboard asks which cloud it runs in, even when it is told to report nothing: the machine's own link."""


def state(run_dir: Path) -> str:
    return json.loads((run_dir / "summary.json").read_text())["state_sha256"]


@pytest.fixture
def ten(tiny_config, tmp_path) -> Path:
    """The YAML of a private run of ten clients, which says nothing of Flower, and whose output is `tmp_path / run`."""
    config = tiny_config(
        data__partition={"kind": "iid", "clients": 10},
        federation__cohort=10,
        federation__rounds=2,
        federation__batch_size=8,
    )
    path = tmp_path / "ten.yaml"
    path.write_text(dump_config(config))
    return path


class OneAtATime(Backend):
    """Flower's engine without Ray: the ClientApp runs in one thread of this process."""

    def __init__(self, backend_config: object) -> None:
        super().__init__({})

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        self.app = app_fn()

    @property
    def num_workers(self) -> int:
        return 1

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None: ...

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        return self.app(message, context), context


@pytest.fixture
def flower(monkeypatch, tmp_path, ten) -> Callable[..., None]:
    """What `flwr-simulation` does with the repository's apps and a run config, in this process."""
    # A module of tests has the name of the app's folder, and would be found first.
    others = [place for place in sys.path if not (Path(place) / "server.py").exists()]
    monkeypatch.setattr(sys, "path", [str(PROJECT), *others])
    monkeypatch.delitem(sys.modules, "server", raising=False)
    monkeypatch.setattr(raybackend, "RayBackend", OneAtATime)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.delenv("FEDLORA_NODE", raising=False)
    monkeypatch.delenv("FEDLORA_CONFIG", raising=False)

    def start(nodes: int, **words: str) -> None:
        words = {"config": str(ten), "set": "", **words}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
        run = Run.create_empty(run_id=7)
        run.primary_task_id, run.federation_id, run.override_config = 9, NOOP_FEDERATION_ID, words
        _run_simulation(
            server_app_attr="server.server_app:app",
            client_app_attr="clients.client_app:app",
            num_supernodes=nodes,
            app_dir=str(PROJECT),
            run=run,
            server_app_context=Context(7, 1, {}, RecordDict(), words),
            is_app=True,
            exit_event=EventType.FLWR_SIMULATION_RUN_LEAVE,
        )

    return start


def test_the_two_apps_end_in_the_state_of_the_local_reference(ten, flower, tmp_path):
    local = simulate(load_config(ten), tmp_path / "local", lambda event: None)
    flower(10)
    run_dir = tmp_path / "run"
    assert state(run_dir) == state(local)
    assert (run_dir / "adapter" / "adapter_model.safetensors").exists() and (run_dir / "report.html").exists()
    assert len(list((run_dir / "ledgers").iterdir())) == 10
    assert not (run_dir / ".flower").exists()


def test_an_interrupted_run_goes_on_by_its_own_config_only_and_a_finished_one_is_left_alone(
    ten, flower, tmp_path
):
    local = simulate(load_config(ten), tmp_path / "local", lambda event: None)

    def interrupt(event: object) -> None:
        if isinstance(event, RoundDone):
            raise KeyboardInterrupt

    run_dir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate(load_config(ten), run_dir, interrupt)
    with pytest.raises(ConfigError, match="seed is 7 there, 8 here"):
        flower(10, set="seed=8")
    flower(10)
    assert state(run_dir) == state(local)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    flower(10)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("nodes", [9, 11])
def test_another_number_of_nodes_is_refused_before_anything_is_spent(nodes, flower, tmp_path):
    with pytest.raises(ConfigError, match=rf"{nodes} SuperNodes.*10 clients.*num-supernodes=10"):
        flower(nodes)
    assert not (tmp_path / "run" / "ledgers").exists() and not (tmp_path / "run" / ".flower").exists()


def test_nothing_is_simulated_on_the_nodes_of_a_real_federation(ten, tmp_path):
    grid = PromptGrid("127.0.0.1:9", True, None, token="none")
    with pytest.raises(ConfigError, match="real federation"):
        simulate_on(grid, load_config(ten))
    assert not (tmp_path / "run").exists()


def test_a_node_plays_nobody_where_no_simulation_left_a_scene(ten, monkeypatch):
    """A server of a real federation, which chooses the run config, gets no record out of a node without node.yaml."""
    monkeypatch.delenv("FEDLORA_NODE", raising=False)
    context = Context(7, 1, {"partition-id": 0, "num-partitions": 10}, RecordDict(), {"config": str(ten)})
    with pytest.raises(FileNotFoundError, match=r"setup\.json"):
        greet(context)
    with pytest.raises(FileNotFoundError, match=r"setup\.json"):
        answer(context, b"", None)


def test_a_config_that_is_not_there_is_named_with_the_folder_it_was_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"'nowhere.yaml' is no file in {tmp_path}.*--run-config"):
        named({"config": "nowhere.yaml"})


def test_the_repositorys_own_run_config_names_a_run_of_ten_clients(monkeypatch):
    monkeypatch.chdir(PROJECT)
    words = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = load_config(*named(words))
    assert isinstance(config.data.partition, Dirichlet)
    assert (config.data.partition.clients, config.federation.cohort, config.runtime.kind) == (
        10,
        10,
        "flower",
    )
    assert config.output != load_config("configs/quickstart.yaml").output


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def gateway() -> Iterator[tuple[str, list[bytes]]]:
    """The address of a proxy that lets nothing through, and the first bytes of all that was asked of it."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def listen() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        asked.append(connection.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked


def of_home(home: Path) -> dict[int, str]:
    """Processes that were started with this FLWR_HOME, and their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # not ours, or gone by now
            if entry.name.isdigit() and f"FLWR_HOME={home}\0".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def end_superlink(home: Path) -> None:
    """Flower's local SuperLink, which stays when `flwr` has ended, is gone with all that it started."""
    for pid, command in of_home(home).items():
        if "flower-superlink" in command:
            os.kill(pid, signal.SIGTERM)
    ends = time.monotonic() + 20
    while of_home(home) and time.monotonic() < ends:
        time.sleep(0.1)
    for pid in (left := of_home(home)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


def exports() -> dict[str, str]:
    """What docs/scale.md has its reader export before `flwr run`."""
    (line,) = re.findall(r"^export (FLWR_.*)$", (PROJECT / "docs" / "scale.md").read_text(), re.MULTILINE)
    return dict(word.split("=") for word in line.split())


@pytest.mark.slow  # SuperLink, SuperExec, simulation and actors start, and each imports Flower or torch
def test_flwr_run_ends_in_the_same_state_and_asks_nobody_outside(ten, tmp_path):
    local = simulate(load_config(ten), tmp_path / "local", lambda event: None)
    home, port, control = tmp_path / "flwr", *free_ports(2)
    (user := tmp_path / "user").mkdir()
    with gateway() as (proxy, asked):
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("FLWR_", "FEDLORA_"))
            },
            **exports(),
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy),
            "no_proxy": "127.0.0.1,localhost",
            "NO_PROXY": "127.0.0.1,localhost",
            "HOME": str(user),
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PROJECT),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        words = ["--federation-config", "num-supernodes=10 client-resources-num-cpus=1"]
        words += ["--run-config", f'config="{ten}" set=""']
        try:
            said = subprocess.run(
                [BIN / "flwr", "run", ".", "--stream", *words],
                cwd=PROJECT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=500,
            )
        finally:
            end_superlink(home)
    assert (tmp_path / "run" / "summary.json").exists(), said.stdout
    assert state(tmp_path / "run") == state(local)
    assert [words for words in asked if not CLOUD.match(words)] == []
    assert list(user.iterdir()) == []
