"""The same seed ends in the same state wherever the clients live."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from fedlora.federation.events import ClientDone
from fedlora.runtime.host import worker_count
from fedlora.runtime.simulate import simulate


@pytest.fixture(scope="module", autouse=True)
def ray_gone():
    yield
    import ray

    ray.shutdown()


def state(run_dir) -> str:
    return json.loads((run_dir / "summary.json").read_text())["state_sha256"]


def test_ray_ends_in_the_state_of_the_local_reference(tiny_config, tmp_path):
    local = simulate(tiny_config(), tmp_path / "local", lambda event: None)
    spread = simulate(
        tiny_config(runtime={"kind": "ray", "workers": 2}), tmp_path / "ray", lambda event: None
    )
    assert state(spread) == state(local)


def test_as_many_workers_as_the_config_says(tiny_config):
    def count(**runtime):
        return worker_count(tiny_config(runtime={"kind": "ray", **runtime}).runtime, cores=8)

    assert (count(), count(threads=2), count(threads=16), count(workers=3)) == (8, 4, 1, 3)


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
    status: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it may be gone by now
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                status[int(entry.name)] = (parent, (entry / "cmdline").read_bytes().decode(errors="replace"))

    def is_ours(pid: int) -> bool:
        while pid in status and pid != os.getpid():
            pid = status[pid][0]
        return pid == os.getpid()

    return sorted(pid for pid, (_, title) in status.items() if title.startswith("ray::Host") and is_ours(pid))
