"""What goes wrong with Ray itself, or with one client on it: who is refused, and what a run says as it ends."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError
from ray_processes import answering_workers
from test_ray_cluster import PATIENCE_S, silent, state

from fedlora.errors import IncompleteError
from fedlora.runtime.cluster import connected
from fedlora.runtime.crew import Crew
from fedlora.runtime.prepare import prepare
from fedlora.runtime.ray import ATTEMPTS
from fedlora.runtime.seats import Seat
from fedlora.runtime.simulate import resume, simulate

MANY = {
    "data__partition": {"kind": "iid", "clients": 8},
    "federation__cohort": 8,
    "federation__local_steps": 1,
    "federation__batch_size": 4,
    "federation__rounds": 1,
    "lora__layers_to_transform": [1],
    "privacy": "none",
}


@contextmanager
def poisonous(path: Path) -> Iterator[list[int]]:
    """The worker that opens the file at `path` to read is killed; yields the pids so far.

    Once PATIENCE_S are over, whoever waits there reads an empty file.
    """
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    over = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        ends = time.monotonic() + PATIENCE_S
        while not over.wait(0.01):
            for pid in answering_workers():
                if pid not in killed and _waits_for_a_writer(pid):
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > ends:
                os.close(os.open(path, os.O_RDWR))

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        over.set()
        killer.join()


def _waits_for_a_writer(pid: int) -> bool:
    """Whether the process is stuck in opening a FIFO."""
    with suppress(OSError):
        return any(
            "wait_for_partner" in (task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()
        )
    return False


@pytest.mark.slow  # three workers die
@pytest.mark.parametrize("together", [1, 4])
def test_a_client_that_kills_its_worker_each_time_is_refused_alone(tiny_config, tmp_path, together):
    runtime = {"kind": "ray", "workers": 1, "cache_prefix": True, "clients_together": together}
    config = tiny_config(**MANY, runtime=runtime)
    poison = prepare(config, silent).clients.members[2].client
    run_dir = tmp_path / "struck"
    with poisonous(run_dir / ".states" / poison) as killed:
        simulate(config, run_dir, silent)
    line = json.loads((run_dir / "rounds.jsonl").read_text().splitlines()[-1])
    assert line["refused"] == {poison: "failed"}
    assert len(line["answered"]) == 7
    assert len(killed) == ATTEMPTS


def test_workers_of_an_own_cluster_are_as_nice_as_the_run(tiny_config, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    runtime = tiny_config(runtime__kind="ray", runtime__workers=1).runtime
    with connected(runtime, "run", tmp_path):
        assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


def test_a_run_without_room_for_a_worker_ends_and_says_what_is_missing(tiny_config, tmp_path):
    setup = prepare(tiny_config(privacy="none"), silent).save_for_hosts(tmp_path)
    runtime = setup.config.runtime.model_copy(update={"kind": "ray", "workers": 1})
    with connected(runtime, setup.run, tmp_path) as vitals:
        taken = ray.remote(num_cpus=1)(threading.Event).remote()
        ray.get(taken.is_set.remote())
        crew = Crew(setup, [Seat(cpus=1)], silent, vitals, room_s=1.0)
        ends = time.monotonic() + 60
        with pytest.raises(IncompleteError, match=f"had 1 free core .* fedlora resume {tmp_path}"):
            while time.monotonic() < ends:
                crew.wait(0.2)
        crew.close()


@pytest.mark.slow
def test_a_full_object_store_ends_the_run_and_it_is_resumed_to_the_same_state(tiny_config, tmp_path):
    no_spilling = {
        "automatic_object_spilling_enabled": False,
        "local_fs_capacity_threshold": 1e-6,
        "max_direct_call_object_size": 100,
    }
    arguments = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**arguments, "_system_config": no_spilling})
    short = {"federation__rounds": 2, "privacy": "none"}
    config = tiny_config(**short, runtime={"kind": "ray", "workers": 1})
    local = simulate(tiny_config(**short), tmp_path / "local", silent)
    try:
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        ballast = []
        for size in (8 << 20, 64 << 10, 1 << 10):
            with suppress(RayError):
                while len(ballast) < 100_000:
                    ballast.append(ray.put(os.urandom(size)))
        with pytest.raises(IncompleteError, match="fedlora resume"):
            simulate(config, tmp_path / "full", silent)
        ballast.clear()
        assert state(resume(tmp_path / "full", silent)) == state(local)
    finally:
        ray.shutdown()
        cluster.shutdown()
