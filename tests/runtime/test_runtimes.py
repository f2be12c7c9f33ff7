"""The same seed ends in the same state wherever the clients live."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_processes import below, own_workers

from fedlora.config.load import dump_config
from fedlora.config.schema import RunConfig
from fedlora.errors import IncompleteError
from fedlora.federation.events import ClientDone
from fedlora.runtime.simulate import resume, simulate
from tests.deploy.processes import lives


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


@pytest.mark.fault("F49")
def test_a_killed_ray_worker_is_replaced_and_nothing_is_spent_twice(tiny_config, tmp_path):
    config = tiny_config(runtime={"kind": "ray", "workers": 2})

    def kill_one(event: object) -> None:
        if isinstance(event, ClientDone) and event.round == 1:
            os.kill(own_workers()[0], signal.SIGKILL)

    local = simulate(tiny_config(), tmp_path / "local", lambda event: None)
    struck = simulate(config, tmp_path / "struck", kill_one)
    assert state(struck) == state(local)
    for name in ("local", "struck"):
        counts = [len(p.read_text().splitlines()) - 1 for p in (tmp_path / name / "ledgers").iterdir()]
        assert sum(counts) == 6


@pytest.mark.fault("F49")
@pytest.mark.slow  # Ray starts twice
def test_a_run_whose_ray_dies_says_so_and_is_resumed_to_the_same_state(tiny_config, tmp_path):
    long = {"federation__rounds": 20, "privacy__max_participations": 20}
    local = simulate(tiny_config(**long), tmp_path / "local", lambda event: None)
    config = tiny_config(**long, runtime={"kind": "ray", "workers": 2})
    started = _ends_when_this_dies(config, tmp_path, "/raylet/raylet")
    assert not (Path(config.output) / "summary.json").exists()
    assert state(resume(Path(config.output), lambda event: None)) == state(local)
    ends = time.monotonic() + 60
    while left := [pid for pid in started if lives(pid)]:
        assert time.monotonic() < ends, {pid: started[pid] for pid in left}
        time.sleep(0.1)


@pytest.mark.fault("F49")
@pytest.mark.slow  # half a minute of work without a head
def test_a_run_whose_cluster_has_lost_its_head_says_so(tiny_config, tmp_path):
    runtime = {"kind": "ray", "workers": 2}
    config = tiny_config(federation__rounds=100_000, privacy="none", runtime=runtime)
    _ends_when_this_dies(config, tmp_path, "/gcs/gcs_server")


def _ends_when_this_dies(config: RunConfig, folder: Path, whose: str) -> dict[int, str]:
    """A run that loses one of Ray's processes ends with status 4 and says how to go on; returns all that it started."""
    run_dir, said = Path(config.output), folder / "said.log"
    (folder / "run.yaml").write_text(dump_config(config))
    with said.open("wb") as file:
        command = [sys.executable, "-m", "fedlora.cli.app", "simulate", str(folder / "run.yaml")]
        struck = subprocess.Popen(command, stdout=file, stderr=file)
    log, ends = run_dir / "rounds.jsonl", time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 1):
        assert time.monotonic() < ends and struck.poll() is None, said.read_text()
        time.sleep(0.02)
    started = below(struck.pid)
    (pillar,) = [pid for pid, title in started.items() if whose in title]
    os.kill(pillar, signal.SIGKILL)
    assert struck.wait(120) == IncompleteError.exit_status, said.read_text()
    assert f"fedlora resume {run_dir}" in said.read_text()
    return started
