"""A real federation on loopback: SuperLink, two SuperNodes, executors and the two apps, to the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from fedlora.privacy.ledger import read_ledger

pytestmark = pytest.mark.slow  # each message starts a process that imports torch

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Processes:
    """Commands started with one environment and one log each; all are gone at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str, **environment: str) -> None:
        quiet = {
            "FLWR_HOME": str(self.folder / f"home-{name}"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PROJECT),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env={**os.environ, **quiet, **environment},
                cwd=PROJECT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        for process in reversed(self.started.values()):
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(5)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.stop()


def test_two_nodes_train_two_rounds_and_their_ledgers_say_what_the_server_reports(
    processes, tmp_path, tiny_encoder, topic_files, tiny_config
):
    link, *ports = [_free_port() for _ in range(3)]
    tiny_config()  # leaves run.yaml here
    run = yaml.safe_load((tmp_path / "run.yaml").read_text())
    run["federation"]["rounds"] = 2
    run["data"]["partition"] = {"kind": "iid", "clients": 2}
    run["runtime"] = {"kind": "flower"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    processes.start(
        "link", "flower-superlink", "--insecure", "--port", str(link), "--isolation", "process",
        "--database", str(tmp_path / "state.db"), "--disable-runtime-dependency-installation",
    )  # fmt: skip
    _until(lambda: _healthy(link), 60, processes)
    processes.start(
        "executor", "flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{link}",
        FEDLORA_CONFIG=str(tmp_path / "run.yaml"),
    )  # fmt: skip
    for number, port in enumerate(ports):
        node = _node(tmp_path / f"node-{number}", f"site-{number}", run, topic_files[0])
        processes.start(
            f"node-{number}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}",
            "--port", str(port), "--isolation", "process",
        )  # fmt: skip
        processes.start(
            f"executor-{number}", "flower-superexec", "--insecure",
            "--runtime-api-address", f"127.0.0.1:{port}", FEDLORA_NODE=str(node),
        )  # fmt: skip
    home = tmp_path / "home-submit"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    processes.start("submit", "flwr", "run", str(PROJECT), "here")
    finished = tmp_path / "run" / "adapter" / "README.md"
    _until(finished.exists, 240, processes)

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds_completed"] == 2
    assert summary["participations"] == {"site-0": 2, "site-1": 2}
    for number in range(2):
        ledger = read_ledger(tmp_path / f"node-{number}" / "ledger.jsonl")
        assert ledger.header.noise == "os-entropy"
        assert len(ledger.debits) == 2 and len(ledger.releases) == 2
        assert len(list((tmp_path / f"node-{number}" / "ledger.jsonl.outbox").glob("*.reply"))) == 2
    assert 0 < summary["epsilon_max"] <= 8.0
    card = finished.read_text()
    assert "SIMULATION" not in card and "its own ledger is the authority" in card


def _node(folder: Path, client: str, run: dict, train: Path) -> Path:
    folder.mkdir()
    columns = ("text", "label", "max_length")
    config = {
        "client": client,
        "data": {"source": "files", "train": str(train), **{name: run["data"][name] for name in columns}},
        "declared_records": 360,
        "classes": ["kitchen", "music", "weather"],
        **{name: run[name] for name in ("model", "task", "lora")},
        "work": {"batch_size": 16, "local_steps": 2, "optimizer": {"name": "sgd", "lr": 1.0}},
        "ledger": str(folder / "ledger.jsonl"),
        "budget": {"target_epsilon": 8.0, "target_delta": 1e-5, "max_participations": 3},
        "max_grad_norm": 1.0,
        "min_noise_multiplier": 0.3,
        "reply_quantum_s": 0,
    }
    (folder / "node.yaml").write_text(yaml.safe_dump(config))
    return folder / "node.yaml"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def _until(condition: Callable[[], bool], seconds: float, processes: Processes) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, processes.logs()
        time.sleep(0.2)
