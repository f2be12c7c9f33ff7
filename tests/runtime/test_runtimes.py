"""The same seed ends in the same state wherever the clients live."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from fedlora.runtime.events import ClientDone
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


def test_a_killed_ray_worker_is_replaced_and_nothing_is_spent_twice(tiny_config, tmp_path):
    config = tiny_config(runtime={"kind": "ray", "workers": 2})

    def kill_one(event: object) -> None:
        if isinstance(event, ClientDone) and event.round == 1:
            victim = next(pid for pid, title in _processes() if title.startswith("ray::Host"))
            os.kill(victim, signal.SIGKILL)

    local = simulate(tiny_config(), tmp_path / "local", lambda event: None)
    struck = simulate(config, tmp_path / "struck", kill_one)
    assert state(struck) == state(local)
    for name in ("local", "struck"):
        counts = [len(p.read_text().splitlines()) - 1 for p in (tmp_path / name / "ledgers").iterdir()]
        assert sum(counts) == 6


def _processes() -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it may be gone by now
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append((int(entry.name), title.strip()))
    return found
