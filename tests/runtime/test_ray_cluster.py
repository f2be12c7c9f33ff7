"""Runs on a Ray cluster that was there before them; what kills workers, nodes and runs there. Ray starts in each."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_processes import answering_workers, below

from fedlora.config.load import dump_config
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.events import ClientDone
from fedlora.runtime.simulate import resume, simulate
from tests.deploy.processes import lives

pytestmark = pytest.mark.slow

PATIENCE_S = 240.0
STORE_BYTES = 80 << 20
CLIENT_PORT = 23001


@pytest.fixture
def cluster() -> Iterator:
    """A head without cores for work, and two nodes with one each, as processes on loopback."""
    import ray
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "ray_client_server_port": CLIENT_PORT,
        },
    )
    found.workers = [found.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(2)]
    yield found
    ray.shutdown()
    found.shutdown()


def state(run_dir: Path) -> str:
    return json.loads((run_dir / "summary.json").read_text())["state_sha256"]


def silent(event: object) -> None:
    """Nobody listens."""


def test_a_run_goes_on_when_a_node_dies_in_mid_round(tiny_config, tmp_path, cluster):
    killed = []

    def kill_one(event: object) -> None:
        if isinstance(event, ClientDone) and event.round == 2 and not killed:
            killed.append(cluster.workers[1])
            cluster.remove_node(cluster.workers[1], allow_graceful=False)

    local = simulate(tiny_config(), tmp_path / "local", silent)
    config = tiny_config(runtime={"kind": "ray", "address": cluster.address})
    assert state(simulate(config, tmp_path / "struck", kill_one)) == state(local)
    assert killed


@pytest.mark.parametrize("address", ["auto", f"ray://127.0.0.1:{CLIENT_PORT}"])
def test_the_cluster_of_this_machine_and_one_reached_from_outside_end_in_the_same_state(
    tiny_config, tmp_path, cluster, address
):
    short = {"federation__rounds": 2, "privacy": "none"}
    local = simulate(tiny_config(**short), tmp_path / "local", silent)
    config = tiny_config(**short, runtime={"kind": "ray", "address": address})
    assert state(simulate(config, tmp_path / "ray", silent)) == state(local)


def test_two_runs_on_one_cluster_do_not_meet(tiny_config, tmp_path, cluster):
    runs, started = [tmp_path / "one", tmp_path / "two"], []
    for run_dir, seed in zip(runs, (7, 8), strict=True):
        runtime = {"kind": "ray", "address": cluster.address, "workers": 1}
        config = tiny_config(runtime=runtime, seed=seed, output=str(run_dir))
        started.append(begun(config, tmp_path / f"{run_dir.name}.yaml"))
    for run_dir, process in zip(runs, started, strict=True):
        assert process.wait(PATIENCE_S) == 0, run_dir.name
    for run_dir, seed in zip(runs, (7, 8), strict=True):
        assert state(simulate(tiny_config(seed=seed), tmp_path / f"local {seed}", silent)) == state(run_dir)


def test_a_machine_that_does_not_see_the_run_directory_is_named(tiny_config, tmp_path):
    from fedlora.runtime.crew import SIGN, HostActor
    from fedlora.runtime.prepare import prepare

    setup = prepare(tiny_config(privacy="none"), silent).save_for_hosts(tmp_path)
    (setup.holdings / SIGN).write_text("another run's")
    with pytest.raises(ConfigError, match=f"does not see the run directory {tmp_path}"):
        HostActor().begin(setup, "this run's")


def test_nobody_at_the_address_is_said(tiny_config, tmp_path):
    config = tiny_config(privacy="none", runtime={"kind": "ray", "address": "127.0.0.1:9"})
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9.*ray start --head"):
        simulate(config, tmp_path / "run", silent)


@pytest.mark.parametrize("workers", [1, 8])
def test_the_number_of_workers_changes_nothing(tiny_config, tmp_path, workers):
    many = {
        "data__partition": {"kind": "iid", "clients": 12},
        "federation__cohort": 10,
        "federation__local_steps": 1,
        "federation__batch_size": 4,
        "federation__rounds": 2,
        "privacy": "none",
    }
    local = simulate(tiny_config(**many), tmp_path / "local", silent)
    config = tiny_config(**many, runtime={"kind": "ray", "workers": workers})
    assert state(simulate(config, tmp_path / "ray", silent)) == state(local)


def test_a_client_that_three_workers_died_with_is_refused_and_can_be_asked_again(tiny_config, tmp_path):
    long = {"federation__cohort": 1, "federation__local_steps": 300, "federation__rounds": 1}
    config = tiny_config(**long, privacy="none", runtime={"kind": "ray", "workers": 1})
    over = threading.Event()
    struck: set[int] = set()

    def kill() -> None:
        while not over.wait(0.005):
            for pid in set(answering_workers()) - struck:
                struck.add(pid)
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(IncompleteError, match="failed"):
            simulate(config, tmp_path / "struck", silent)
    finally:
        over.set()
        killer.join()
    assert len(struck) == 3
    resume(tmp_path / "struck", silent)
    local = simulate(tiny_config(**long, privacy="none"), tmp_path / "local", silent)
    assert state(tmp_path / "struck") == state(local)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_leaves_no_process_and_can_be_resumed(tiny_config, tmp_path, number):
    long = {"federation__rounds": 12, "privacy": "none"}
    config = tiny_config(**long, runtime={"kind": "ray", "workers": 2})
    run_dir = Path(config.output)
    process = begun(config, tmp_path / "stopped.yaml")
    log = run_dir / "rounds.jsonl"
    ends = time.monotonic() + PATIENCE_S
    while not (log.exists() and len(log.read_text().splitlines()) > 1):
        assert time.monotonic() < ends and process.poll() is None, (tmp_path / "stopped.said").read_text()
        time.sleep(0.02)
    started = below(process.pid)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == IncompleteError.exit_status
    assert "fedlora resume" in (tmp_path / "stopped.said").read_text()
    while left := {pid: title for pid, title in started.items() if lives(pid)}:
        assert time.monotonic() < ends, left
        time.sleep(0.1)
    config = tiny_config(**long)
    assert state(resume(run_dir, silent)) == state(simulate(config, tmp_path / "local", silent))


def begun(config: object, path: Path) -> subprocess.Popen:
    """`fedlora simulate`, in a process of its own; what it says goes to a file beside the config."""
    path.write_text(dump_config(config))
    with path.with_suffix(".said").open("wb") as said:
        command = [sys.executable, "-m", "fedlora.cli.app", "simulate", str(path)]
        return subprocess.Popen(command, stdout=said, stderr=said)
