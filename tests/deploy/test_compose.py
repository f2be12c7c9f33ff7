"""The compose file, really started: images, provisioning, real MiniLM on three nodes, and processes killed under way.

`make compose-test` runs it. It takes the Docker engine that runs, or starts one of its own where root may; where there
is none, or with FEDLORA_COMPOSE=processes, the same services run as processes, and what only containers can show is
skipped. It says which it was.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from fedlora.deploy.replay import replay
from fedlora.privacy.accountants import agreed_epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import Contents, events_of
from tests.deploy.as_processes import in_processes
from tests.deploy.containers import Containers, in_containers
from tests.deploy.deployment import LEDGER, RUN, Deployment
from tests.deploy.engine import NoEngineError
from tests.deploy.story import CLIENTS, KILLED, PROJECT, QUIET, ROUNDS, Story, live, metrics, status
from tests.deploy.strangers import PROBE, REACH, RIGHTS

pytestmark = pytest.mark.slow
PARTS = (
    "docker-compose.yml", ".dockerignore", "pyproject.toml", "README.md", "proxy", "server", "clients", "fedlora",
)  # fmt: skip
GROWTH = 64 << 20


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """All is there, keys and images too, and nothing started."""
    folder = tmp_path_factory.mktemp("compose")
    for part in PARTS:
        source = PROJECT / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
    _longer(folder)
    with ExitStack() as stack:
        found, names, why = None, [], "FEDLORA_COMPOSE=processes"
        if os.environ.get("FEDLORA_COMPOSE") != "processes":
            try:
                found = stack.enter_context(in_containers(folder, tmp_path_factory.mktemp("images")))
            except NoEngineError as error:
                why = str(error)
        if found is None:
            if sys.platform != "linux":
                pytest.skip(
                    f"no container was started ({why}), and only Linux has loopback addresses for processes"
                )
            found = stack.enter_context(in_processes(folder))
            names = [word for name in found.server_names for word in ("--server-name", name)]
            warnings.warn(
                f"no container was started ({why}): rights, networks and floods are untested", stacklevel=1
            )
        print(f"the services run as {found.kind}")
        command = [sys.executable, "-m", "fedlora.cli.app", "provision", "certs", "--nodes", "3", *names]
        subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(PROJECT)}, check=True)
        yield found


@pytest.fixture
def containers(federation: Deployment) -> Containers:
    if not isinstance(federation, Containers):
        pytest.skip(f"the services run as {federation.kind}: rights and networks are a container engine's")
    return federation


def _longer(folder: Path) -> None:
    """The demonstration with more rounds, and a budget for the attempts that the kills cost."""
    for name, section, key, value in (
        ("server/run.yaml", "federation", "rounds", ROUNDS),
        ("server/run.yaml", "federation", "deadline_s", 180),
        ("clients/node.yaml", "budget", "max_participations", ROUNDS + 3),
    ):
        path = folder / name
        words = yaml.safe_load(path.read_text())
        words[section][key] = value
        path.write_text(yaml.safe_dump(words))


@pytest.fixture(scope="module")
def story(federation: Deployment) -> Story:
    return live(federation)


@pytest.fixture(scope="module")
def run(federation: Deployment, story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's directory, copied out when it was over."""
    copied = tmp_path_factory.mktemp("copied") / "run"
    federation.copy("server", RUN, copied)
    return copied


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_a_run_goes_on_through_killed_processes_until_its_adapter_is_there(federation, run, tmp_path):
    summary, lines = json.loads((run / "summary.json").read_text()), _lines(run)
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    print([(line["round"], line["answered"], line["refused"], line["seconds"]) for line in lines[1:]])
    assert summary["rounds_completed"] == ROUNDS
    assert summary["score"] > summary["score_before"]
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    for name, service in CLIENTS.items():
        answered = sum(name in line["answered"] for line in lines)
        assert answered == summary["participations"][name]
        assert answered >= ROUNDS - 2  # at most the rounds in which something of it was killed
        federation.copy(service, LEDGER, tmp_path / f"{name}.jsonl")
        _check_ledger(read_ledger(tmp_path / f"{name}.jsonl"), answered)
        assert summary["epsilon_by_client"][name] <= 8.0


def _check_ledger(ledger: Contents, answered: int) -> None:
    """Every debit is an answer or a lost attempt; every round was released at most once; the budget holds."""
    released = [debit for debit in ledger.debits if ledger.released(debit.seq) is not None]
    assert len({(debit.run, debit.round) for debit in released}) == len(released)
    assert answered <= len(released) <= len(ledger.debits)
    lost = len(ledger.debits) - len(released)
    assert lost <= 1  # one executor was killed once, and nothing else loses an attempt
    assert agreed_epsilon(events_of(ledger.debits), 1e-5) <= 8.0


def test_the_journal_gives_the_killed_servers_model_again_bit_for_bit(run):
    played = list(replay(run))
    assert [number for number, _ in played] == list(range(1, ROUNDS + 1))
    assert played[-1][1] == json.loads((run / "summary.json").read_text())["state_sha256"]


def test_a_round_costs_little_more_than_its_training(federation, run):
    rounds = {line["round"]: line["seconds"] for line in _lines(run)[1:]}
    trainings = [federation.trainings(service) for service in CLIENTS.values()]
    over = {}
    for number in range(KILLED + 1, ROUNDS + 1):
        # Counted from the end: of a node that was killed, earlier ones are missing or twice there.
        longest = max(times[number - ROUNDS - 1] for times in trainings)
        over[number] = round(rounds[number] - longest, 1)
        print(f"round {number}: {rounds[number]:.1f} s, the longest training {longest:.1f} s")
    print(f"over training: {over} s; load average {os.getloadavg()[0]:.1f}")
    # 5 on a machine that does nothing else; this finds what waits for a time-out.
    assert median(over[number] for number in range(KILLED + 1, QUIET + 1)) < 30


def test_the_monitor_is_there_before_the_run_and_outlives_every_process_of_it(federation, story):
    metrics_then, status_then = story.before
    assert "fedlora_run_readable 0" in metrics_then
    assert status_then.returncode == 4 and "has not begun" in status_then.stderr
    assert federation.starts("monitor") == 0 and federation.is_healthy("monitor")


def test_the_monitor_tells_the_runs_own_figures_to_people_and_to_prometheus(federation, run):
    asked, lines = status(federation), _lines(run)
    assert asked.returncode == 0, asked.stderr
    told, summary = json.loads(asked.stdout), json.loads((run / "summary.json").read_text())
    assert told["finished"] and told["rounds_completed"] == lines[-1]["round"] == ROUNDS
    assert told["score"] == lines[-1]["score"] and told["participations"] == summary["participations"]
    assert told["epsilon_by_client"] == pytest.approx(summary["epsilon_by_client"])
    figures = dict(line.rsplit(" ", 1) for line in metrics(federation).splitlines() if line[0] != "#")
    assert float(figures["fedlora_rounds_completed"]) == ROUNDS
    assert float(figures["fedlora_rounds_seconds"]) == pytest.approx(told["seconds"])
    for name, epsilon in told["epsilon_by_client"].items():
        assert float(figures[f'fedlora_epsilon{{client="{name}"}}']) == pytest.approx(epsilon)
        participations = float(figures[f'fedlora_client_participations{{client="{name}"}}'])
        assert participations == told["participations"][name]


@pytest.mark.parametrize("service", ["superlink", "node-1", "node-2", "node-3", "monitor"])
def test_a_service_with_a_health_check_is_well(federation, story, service):
    assert federation.is_healthy(service)


def test_a_node_gets_through_the_proxy_to_the_fleet_path_and_to_nothing_else(containers, story):
    open_to_all, closed = "/v1/fleet/pull-messages", (
        "/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/",
        "/v1/fleet/", "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs", "//v1/control/list-runs", "/v1/control/../fleet/../control/list-runs",
        "/v1/fleet/pull-messages/../../runtime/acquire-task", "/V1/control/list-runs", "/v1/fleet/x;/../../control",
    )  # fmt: skip
    lines = containers.python("node-1", PROBE, open_to_all, *closed).splitlines()
    said = {path: status for status, path in (line.split() for line in lines)}
    assert said.pop(open_to_all) in {"400", "401", "415", "422"}  # the SuperLink's own answer to a stranger
    assert set(said) == set(closed)
    assert set(said.values()) == {"404"}


def test_a_node_reaches_the_proxy_alone_and_its_records_reach_its_node_alone(containers, story):
    ports = {"superlink": 8000, "node-2": 9094, "monitor": 9443}
    elsewhere = ["server:22", *(f"{service}:{port}" for service, port in ports.items())]
    elsewhere += [f"{address}:{port}" for one, port in ports.items() for address in containers.addresses(one)]
    for service, mine, not_mine in (
        ("node-1", ["proxy:8443"], elsewhere),
        ("client-1", ["supernode:9094"], [*elsewhere, "proxy:8443"]),
        ("monitor", ["monitor:9443"], [place for place in elsewhere if ":9443" not in place]),
    ):
        lines = containers.python(service, REACH, *mine, *not_mine).splitlines()
        assert [line.split()[0] for line in lines if line.endswith("reached")] == mine


@pytest.mark.parametrize("service", ["superlink", "server", "monitor", "node-1", "client-1"])
def test_a_service_has_no_rights_that_it_does_not_need(containers, story, service):
    assert containers.python(service, RIGHTS) == "10001 0 0 1 (0, 0) False"


def test_the_monitor_cannot_write_where_the_run_lies(containers, story):
    done = containers.attempt(
        "exec", "-T", "monitor", "sh", "-c", f"test -r {RUN}/rounds.jsonl && touch {RUN}/x"
    )
    assert done.returncode != 0 and "Read-only file system" in done.stderr


@pytest.mark.fault("F30")
def test_a_stranger_neither_makes_the_services_grow_nor_keeps_a_node_out_of_a_round(containers, story, run):
    seconds = {line["round"]: line["seconds"] for line in _lines(run)}
    quiet = [seconds[number] for number in range(KILLED + 1, QUIET + 1)]
    flooded = [seconds[number] for number in range(QUIET + 1, ROUNDS + 1)]
    print(story.flood, f"rounds {quiet} s, then {flooded} s: {median(flooded) / median(quiet):.2f} times")
    before, during = story.memory["quiet"], story.memory["flood"]
    print({name: f"{was >> 20} MiB, then {during[name] >> 20}" for name, was in before.items()})
    assert story.flood["large"] == ["413"]
    assert set(story.flood["chunked"]) <= {"413", "503", "cut off"}
    assert all(during[name] - was < GROWTH for name, was in before.items())
    assert all(_lines(run)[number]["answered"] == list(CLIENTS) for number in range(QUIET + 1, ROUNDS + 1))
