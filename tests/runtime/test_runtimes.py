"""The same seed ends in the same state wherever the clients live."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora.config.load import dump_config
from fedlora.errors import IncompleteError
from fedlora.federation.events import ClientDone
from fedlora.runtime.host import worker_count
from fedlora.runtime.simulate import resume, simulate


@pytest.fixture(scope="module", autouse=True)
def ray_gone():
    yield
    import ray

    ray.shutdown()


def state(run_dir) -> str:
    return json.loads((run_dir / "summary.json").read_text())["state_sha256"]


def test_ray_ends_in_the_state_of_the_local_reference(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # somebody else's cluster; the config names none
    local = simulate(tiny_config(), tmp_path / "local", lambda event: None)
    spread = simulate(
        tiny_config(runtime={"kind": "ray", "workers": 2}), tmp_path / "ray", lambda event: None
    )
    assert state(spread) == state(local)


def test_as_many_workers_as_the_config_says(tiny_config):
    def count(**runtime):
        return worker_count(tiny_config(runtime={"kind": "ray", **runtime}).runtime, cores=8)

    assert (count(), count(threads=2), count(threads=16), count(workers=3)) == (8, 4, 1, 3)


@pytest.mark.fault("F49")
def test_a_killed_ray_worker_is_replaced_and_nothing_is_spent_twice(tiny_config, tmp_path):
    config = tiny_config(runtime={"kind": "ray", "workers": 2})

    def kill_one(event: object) -> None:
        if isinstance(event, ClientDone) and event.round == 1:
            os.kill(_own_workers()[0], signal.SIGKILL)

    local = simulate(tiny_config(), tmp_path / "local", lambda event: None)
    struck = simulate(config, tmp_path / "struck", kill_one)
    assert state(struck) == state(local)
    for name in ("local", "struck"):
        counts = [len(p.read_text().splitlines()) - 1 for p in (tmp_path / name / "ledgers").iterdir()]
        assert sum(counts) == 6


def _own_workers() -> list[int]:
    """Ray's worker processes below this one: another run on the machine is none of our business."""
    return sorted(pid for pid, title in _below(os.getpid()).items() if title.startswith("ray::Host"))


def _below(root: int) -> dict[int, str]:
    """Command lines of the processes that this one started, and that those did."""
    status: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it may be gone by now
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                status[int(entry.name)] = (parent, (entry / "cmdline").read_bytes().decode(errors="replace"))

    def is_below(pid: int) -> bool:
        while pid in status and pid != root:
            pid = status[pid][0]
        return pid == root

    return {pid: title for pid, (_, title) in status.items() if is_below(pid)}


@pytest.mark.fault("F49")
@pytest.mark.slow  # Ray starts four times
@pytest.mark.parametrize("whose", ["/raylet/raylet", "/gcs/gcs_server"])
def test_a_run_whose_ray_dies_says_so_and_is_resumed_to_the_same_state(tiny_config, tmp_path, whose):
    rounds = 400 if "gcs" in whose else 20  # work goes on for half a minute without a head
    long = {"federation__rounds": rounds, "privacy": "none"}
    local = simulate(tiny_config(**long), tmp_path / "local", lambda event: None)
    config = tiny_config(**long, runtime={"kind": "ray", "workers": 2})
    run_dir = Path(config.output)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    with (tmp_path / "said.log").open("wb") as said:
        command = [sys.executable, "-m", "fedlora.cli.app", "simulate", str(tmp_path / "run.yaml")]
        struck = subprocess.Popen(command, stdout=said, stderr=said)
    log = run_dir / "rounds.jsonl"
    ends = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 1):
        assert time.monotonic() < ends and struck.poll() is None, (tmp_path / "said.log").read_text()
        time.sleep(0.02)
    started = _below(struck.pid)
    (pillar,) = [pid for pid, title in started.items() if whose in title]
    os.kill(pillar, signal.SIGKILL)
    assert struck.wait(120) == IncompleteError.exit_status
    assert f"fedlora resume {run_dir}" in (tmp_path / "said.log").read_text()
    assert not (run_dir / "summary.json").exists()
    assert state(resume(run_dir, lambda event: None)) == state(local)
    ends = time.monotonic() + 60
    while left := [pid for pid in started if _lives(pid)]:
        assert time.monotonic() < ends, {pid: started[pid] for pid in left}
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
