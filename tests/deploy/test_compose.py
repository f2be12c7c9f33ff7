"""The compose file, really started: images, provisioning, real MiniLM on three nodes, and processes killed under way.

`make compose-test` runs it. It takes the Docker engine that runs, or starts one of its own where root may; where there
is none at all it is skipped with the reason, and nothing is shown about the compose file.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from fedlora.privacy.accountants import agreed_epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import Contents, events_of
from tests.deploy.engine import NoEngineError, base_images, engine, pip_as_here
from tests.deploy.strangers import FLOOD, HONEST, PROBE, REACH, RIGHTS

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).parents[2]
PARTS = (
    "docker-compose.yml", ".dockerignore", "pyproject.toml", "README.md", "proxy", "server", "clients", "fedlora",
)  # fmt: skip
ROUNDS = 5
RUN = "/var/lib/fedlora/run"
NODES = ("client-1", "client-2", "client-3")


class Federation:
    """The project's compose file in a folder of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def compose(self, *words: str, timeout: float = 900) -> str:
        """What the command prints; the test fails if it does."""
        done = self.attempt(*words, timeout=timeout)
        assert done.returncode == 0, f"docker compose {' '.join(words)}\n{done.stderr[-3000:]}"
        return done.stdout

    def attempt(self, *words: str, timeout: float = 900) -> "subprocess.CompletedProcess[str]":
        command = ["docker", "compose", "--profile", "cpu", *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def inside(self, service: str, *command: str) -> str:
        return self.attempt("exec", "-T", service, *command).stdout

    def python(self, service: str, code: str, *words: str) -> str:
        """What the code prints, run as the service's own user in its container."""
        return self.compose("exec", "-T", service, "python", "-c", code, *words).strip()

    def kill(self, service: str) -> None:
        """kill -9 of all that runs in the container but its init, which ends with it: what a crash looks like."""
        self.attempt("exec", "-T", service, "sh", "-c", "kill -9 -1")

    def rounds(self) -> list[dict]:
        """The finished rounds; none while the server is away."""
        lines = self.inside("server", "cat", f"{RUN}/rounds.jsonl").splitlines()
        return [json.loads(line) for line in lines][1:]

    def answered(self, client: str) -> int:
        return self.attempt("logs", "--no-log-prefix", client).stdout.count("'train' message answered")

    def debits(self, client: str) -> int:
        return self.inside(client, "cat", "/var/lib/fedlora/ledger.jsonl").count('"kind":"debit"')

    def starts(self, service: str) -> int:
        name = self.compose("ps", "--all", "--quiet", service).strip()
        form = ["docker", "inspect", "--format", "{{.RestartCount}}", name]
        return int(
            subprocess.run(form, env=self.environment, capture_output=True, text=True, check=True).stdout
        )


def _until(is_so: Callable[[], bool], seconds: float, federation: Federation, what: str) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            said = federation.attempt("logs", "--tail", "15").stdout
            said += federation.inside("server", "tail", "-n", "25", f"{RUN}/server.log")
            pytest.fail(f"not within {seconds:.0f} s: {what}\n{said}")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Images built, keys made, nothing started."""
    folder = tmp_path_factory.mktemp("compose")
    for part in PARTS:
        source = PROJECT / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
    _longer(folder)
    try:
        with engine() as environment, pip_as_here() as pip:
            stand_ins = base_images(environment, tmp_path_factory.mktemp("images"))
            if stand_ins:
                warnings.warn(f"stand-ins of this machine's files for {', '.join(stand_ins)}", stacklevel=1)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            names = {
                "COMPOSE_PROJECT_NAME": f"fedlora-test-{os.getpid()}",
                "FEDLORA_LISTEN": f"127.0.0.1:{port}",
            }
            federation = Federation(folder, {**environment, **pip, **names})
            command = [sys.executable, "-m", "fedlora.cli.app", "provision", "certs", "--nodes", "3"]
            subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(PROJECT)}, check=True)
            federation.compose("build", timeout=1800)
            try:
                yield federation
            finally:
                federation.attempt("down", "--volumes", "--timeout", "1")
    except NoEngineError as error:
        pytest.skip(f"no container was started: {error}")


def _longer(folder: Path) -> None:
    """The demonstration with more rounds, and a budget for the attempts that the kills cost."""
    for name, section, key, value in (
        ("server/run.yaml", "federation", "rounds", ROUNDS),
        ("server/run.yaml", "federation", "deadline_s", 90),
        ("clients/node.yaml", "budget", "max_participations", ROUNDS + 3),
    ):
        path = folder / name
        words = yaml.safe_load(path.read_text())
        words[section][key] = value
        path.write_text(yaml.safe_dump(words))


@pytest.fixture(scope="module")
def finished(federation: Federation) -> dict[str, float]:
    """The run is over: a SuperNode, an executor and the server were killed on the way. Seconds, for people to read."""
    began = time.monotonic()
    federation.compose("up", "--detach")
    up = time.monotonic() - began
    _until(lambda: len(federation.rounds()) >= 1, 240, federation, "the first round")
    first = time.monotonic() - began

    _until(lambda: federation.debits("client-2") > 1, 60, federation, "node 2 is asked in round 2")
    federation.kill("node-2")
    _until(lambda: federation.starts("node-2") > 0, 30, federation, "its SuperNode starts again")
    _until(lambda: len(federation.rounds()) >= 2, 240, federation, "the second round")
    back = time.monotonic() - began

    before = federation.debits("client-3")
    _until(lambda: federation.debits("client-3") > before, 120, federation, "node 3 works")
    federation.kill("client-3")
    federation.kill("server")
    _until(lambda: federation.starts("server") > 0, 30, federation, "the server starts again")
    killed = time.monotonic() - began
    _until(lambda: bool(federation.inside("server", "ls", f"{RUN}/adapter")), 480, federation, "the adapter")
    end = time.monotonic() - began
    seconds = {"up": up, "first round": first, "second round": back, "server killed": killed, "adapter": end}
    print({name: round(value, 1) for name, value in seconds.items()})
    return seconds


def test_a_run_goes_on_through_killed_processes_until_its_adapter_is_there(federation, finished, tmp_path):
    federation.compose("cp", f"server:{RUN}/.", str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    print([(line["round"], line["answered"], line["refused"], line["seconds"]) for line in lines[1:]])
    assert summary["rounds_completed"] == ROUNDS
    assert summary["score"] > summary["score_before"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    for client in NODES:
        answered = sum(client in line["answered"] for line in lines)
        assert answered == summary["participations"][client]
        assert answered >= ROUNDS - 2  # at most the rounds in which something of it was killed
        _check_ledger(_ledger(federation, client, tmp_path), answered)
        assert summary["epsilon_by_client"][client] <= 8.0


def _ledger(federation: Federation, client: str, folder: Path) -> Contents:
    federation.compose("cp", f"{client}:/var/lib/fedlora/ledger.jsonl", str(folder / f"{client}.jsonl"))
    return read_ledger(folder / f"{client}.jsonl")


def _check_ledger(ledger: Contents, answered: int) -> None:
    """Every debit is an answer or a lost attempt; every round was released at most once; the budget holds."""
    released = [debit for debit in ledger.debits if ledger.released(debit.seq) is not None]
    assert len({(debit.run, debit.round) for debit in released}) == len(released)
    assert answered <= len(released) <= len(ledger.debits)
    lost = len(ledger.debits) - len(released)
    assert lost <= 1  # one executor was killed once, and nothing else loses an attempt
    assert agreed_epsilon(events_of(ledger.debits), 1e-5) <= 8.0


def test_a_node_gets_through_the_proxy_to_the_fleet_path_and_to_nothing_else(federation, finished):
    open_to_all, closed = "/v1/fleet/pull-messages", (
        "/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/",
        "/v1/fleet/", "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs", "//v1/control/list-runs", "/v1/control/../fleet/../control/list-runs",
        "/v1/fleet/pull-messages/../../runtime/acquire-task", "/V1/control/list-runs", "/v1/fleet/x;/../../control",
    )  # fmt: skip
    lines = federation.python("node-1", PROBE, open_to_all, *closed).splitlines()
    said = {path: status for status, path in (line.split() for line in lines)}
    assert said.pop(open_to_all) in {"400", "401", "415", "422"}  # the SuperLink's own answer to a stranger
    assert set(said) == set(closed)
    assert set(said.values()) == {"404"}


def test_a_node_reaches_the_proxy_alone_and_its_records_reach_its_node_alone(federation, finished):
    superlink, other = (_addresses(federation, service) for service in ("superlink", "node-2"))
    elsewhere = ["superlink:8000", "server:22", "node-2:9094", *(f"{address}:8000" for address in superlink)]
    elsewhere += [f"{address}:9094" for address in other]
    for service, mine, not_mine in (
        ("node-1", ["proxy:8443"], elsewhere),
        ("client-1", ["supernode:9094"], [*elsewhere, "proxy:8443"]),
    ):
        lines = federation.python(service, REACH, *mine, *not_mine).splitlines()
        assert [line.split()[0] for line in lines if line.endswith("reached")] == mine


def _addresses(federation: Federation, service: str) -> list[str]:
    name = federation.compose("ps", "--quiet", service).strip()
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}"
    command = ["docker", "inspect", "--format", form, name]
    return subprocess.run(
        command, env=federation.environment, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize("service", ["superlink", "server", "node-1", "client-1"])
def test_a_service_has_no_rights_that_it_does_not_need(federation, finished, service):
    assert federation.python(service, RIGHTS) == "10001 0 0 1 (0, 0) False"


@pytest.fixture
def flood(federation: Federation) -> Iterator[dict]:
    """A stranger holds what it can hold of the published port, from one address. What it got."""
    host, port = federation.environment["FEDLORA_LISTEN"].split(":")
    command = [sys.executable, "-c", FLOOD, host, port, str(federation.folder / "certs" / "ca.crt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        said = stranger.stdout.readline()
        assert said, "the stranger failed"
        yield json.loads(said)
        stranger.kill()


def test_a_stranger_neither_makes_the_services_grow_nor_keeps_a_node_out(federation, finished, request):
    before = _memory(federation)
    flood = request.getfixturevalue("flood")
    seconds = float(federation.python("node-1", HONEST))
    during = _memory(federation)
    print(flood, f"{seconds:.2f} s", before, during)
    assert flood["large"] == "413"
    assert flood["chunked"] == "413"
    assert seconds < 2
    for service, bytes_before in before.items():
        assert during[service] - bytes_before < 64 << 20


def _memory(federation: Federation) -> dict[str, int]:
    """Bytes that the two services that hear strangers have in memory: resident, and in /tmp."""
    found = {}
    for service in ("proxy", "superlink"):
        name = federation.compose("ps", "--quiet", service).strip()
        top = ["docker", "top", name, "-eo", "pid,rss"]
        lines = subprocess.run(
            top, env=federation.environment, capture_output=True, text=True, check=True
        ).stdout
        # Not du: what nginx buffers are files without a name.
        in_tmp = int(federation.inside(service, "df", "-kP", "/tmp").splitlines()[-1].split()[2])
        found[service] = (sum(int(line.split()[1]) for line in lines.splitlines()[1:]) + in_tmp) << 10
    return found
