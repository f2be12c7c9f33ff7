"""Commands as processes on loopback, with their logs; and what a node among them is told."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from itertools import count
from pathlib import Path

import yaml

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
        with (self.folder / f"{name}.log").open("ab") as log:
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


def node_yaml(folder: Path, client: str, run: dict, train: Path, participations: int = 3) -> Path:
    """Of a node whose model and task are the run's; a new folder has it, and will have its ledger."""
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
        "budget": {"target_epsilon": 8.0, "target_delta": 1e-5, "max_participations": participations},
        "max_grad_norm": 1.0,
        "min_noise_multiplier": 0.3,
        "reply_quantum_s": 0,
    }
    (folder / "node.yaml").write_text(yaml.safe_dump(config))
    return folder / "node.yaml"


_PORTS = count(10_000 + os.getpid() % 200 * 100)


def free_port() -> int:
    """On loopback, free a moment ago, and below those that the kernel gives to whoever connects."""
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port := next(_PORTS)))
            return port


def lives(pid: int) -> bool:
    """It is there, and no zombie, which does nothing either."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def healthy(port: int) -> bool:
    """Whether a process of Flower's answers there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float, processes: Processes) -> None:
    """Fails with every log unless the condition comes true in time."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, processes.logs()
        time.sleep(0.2)
