"""A SuperLink, nodes that stay and `fedlora serve`, as processes on loopback."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import Contents
from tests.deploy.processes import PROJECT, Processes, free_port, node_yaml, until

# `python -c` so that this does not depend on how the console script was installed.
SERVE = "from fedlora.cli import app, serve; serve.add_to(app.app); raise SystemExit(app.main())"
NODE = "from fedlora.cli import app, node; node.add_to(app.app); raise SystemExit(app.main())"


class Federation:
    """All of it in one folder, which holds a run.yaml; nothing is started by itself."""

    def __init__(
        self,
        folder: Path,
        train: Path,
        *,
        kit: Path | None = None,
        nodes: int = 2,
        rounds: int = 3,
        deadline_s: float = 30,
        **federation: Any,
    ) -> None:
        """Writes what server and nodes are told.

        Args:
            folder: where everything lies.
            train: records, the same for every node.
            kit: of `fedlora provision`, for TLS and registered nodes.
            nodes: how many there are; all of them are asked in each round.
            rounds: of the run.
            deadline_s: of a round.
            federation: more keys of that section.
        """
        self.folder, self.kit, self.last = folder, kit, rounds
        self.processes = Processes(folder)
        self.config = folder / "run.yaml"
        self.run_dir = folder / "run"
        self.link = free_port()
        self.ports = [free_port() for _ in range(nodes)]
        self.links = [self.link] * nodes
        """Where each SuperNode finds the SuperLink: another port where something stands between them."""
        self.secret = folder / "secret"
        self.secret.write_bytes(os.urandom(32))
        self.run = yaml.safe_load(self.config.read_text())
        self.run["federation"] |= {"rounds": rounds, "cohort": nodes, "deadline_s": deadline_s, **federation}
        self.run["data"]["partition"] = {"kind": "iid", "clients": nodes}
        self.run["runtime"] = {"kind": "flower"}
        self.config.write_text(yaml.safe_dump(self.run))
        self.nodes = [
            node_yaml(folder / self.client(number), self.client(number), self.run, train, rounds + 3)
            for number in range(nodes)
        ]

    def client(self, number: int) -> str:
        """The owner's name, which is its key's too."""
        return f"node-{number + 1}"

    def start_link(self) -> None:
        tls = ["--insecure"]
        if self.kit is not None:
            files = {"ca-": "ca.crt", "": "server.crt", "key": "server.key"}
            tls = ["--enable-supernode-auth"]
            tls += [
                f"--ssl-{name}{'file' if name == 'key' else 'certfile'}={self.kit / file}"
                for name, file in files.items()
            ]
        self.processes.start(
            "link", "flower-superlink", *tls, "--port", str(self.link), "--isolation", "process",
            "--database", str(self.folder / "state.db"), "--disable-runtime-dependency-installation",
            "--superexec-auth-secret-file", str(self.secret),
        )  # fmt: skip

    def start_nodes(self) -> None:
        for number in range(len(self.ports)):
            self.start_supernode(number)
            self.start_executor(number)

    def start_supernode(self, number: int) -> None:
        tls = ["--insecure"]
        if self.kit is not None:
            key = self.kit / f"{self.client(number)}.key"
            tls = [f"--root-certificates={self.kit / 'ca.crt'}", f"--auth-supernode-private-key={key}"]
        places = ["--superlink", f"127.0.0.1:{self.links[number]}", "--port", str(self.ports[number])]
        command = [
            "python",
            "-m",
            "fedlora.deploy.supernode_process",
            *tls,
            *places,
            "--isolation",
            "process",
        ]
        self.processes.start(f"supernode-{number}", *command)

    def start_executor(self, number: int, code: str = NODE) -> None:
        """code: what takes the place of the command `fedlora`."""
        self.processes.start(
            f"executor-{number}", *node_command(self.nodes[number], self.ports[number], code=code)
        )

    def arguments(self) -> list[str]:
        tls = []
        if self.kit is not None:
            tls = ["--root-certificates", str(self.kit / "ca.crt"), "--nodes", str(self.kit / "nodes.json")]
        link = ["--superlink", f"127.0.0.1:{self.link}", "--secret-file", str(self.secret), *tls]
        return ["python", "-c", SERVE, "serve", str(self.config), *link]

    def serve(self, name: str = "server") -> "subprocess.Popen[bytes]":
        self.processes.start(name, *self.arguments())
        return self.processes.started[name]

    def kill(self, name: str) -> None:
        """kill -9 of a process that was started here, and of what it started; it is gone."""
        process = self.processes.started[name]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def said(self, name: str = "server") -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def worker(self) -> int:
        """The process that works on the run."""
        return int((self.run_dir / ".worker.lock").read_text())

    def rounds(self) -> list[int]:
        return [line["round"] for line in self.lines()]

    def lines(self) -> list[dict[str, Any]]:
        """Of rounds.jsonl."""
        path = self.run_dir / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ledger(self, number: int) -> Contents | None:
        """What a node has paid for; None if nothing yet."""
        path = self.nodes[number].with_name("ledger.jsonl")
        return read_ledger(path) if path.exists() else None

    def debits(self) -> list[int]:
        """How many each node has made."""
        ledgers = [self.ledger(number) for number in range(len(self.nodes))]
        return [0 if ledger is None else len(ledger.debits) for ledger in ledgers]

    def wait(self, condition: Callable[[], bool], seconds: float = 90) -> float:
        began = time.monotonic()
        until(condition, seconds, self.processes)
        return time.monotonic() - began

    def finish(self, server: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
        """It ends with status 0; every round is done once and every node paid once for it."""
        self.end(server, seconds)
        for number in range(len(self.nodes)):
            ledger = self.ledger(number)
            assert ledger is not None
            assert [debit.round for debit in ledger.debits] == list(range(1, self.last + 1))

    def end(self, server: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
        """It ends with status 0, and every round is done."""
        self.wait(lambda: server.poll() is not None, seconds)
        assert server.returncode == 0, self.processes.logs()
        assert self.rounds() == list(range(self.last + 1))
        assert (self.run_dir / "adapter" / "README.md").exists() and (self.run_dir / "report.html").exists()

    def stop(self) -> None:
        self.processes.stop()
        if (self.run_dir / ".worker.lock").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker(), signal.SIGKILL)


def node_command(node: Path, port: int, *more: str, code: str = NODE) -> list[str]:
    """`fedlora node` for the SuperNode at this port."""
    return ["python", "-c", code, "node", str(node), "--supernode", f"127.0.0.1:{port}", *more]


HOSTILE = """
from pathlib import Path
Path({marker!r}).write_text("the server's code ran here")
from flwr.clientapp import ClientApp
app = ClientApp()
"""


def hostile_app(folder: Path, marker: Path) -> Path:
    """The project's own app, but for a client app that leaves a mark wherever it is imported."""
    for name in ("pyproject.toml", "server/server_app.py", "clients/client_app.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text((PROJECT / name).read_text())
    (folder / "clients" / "client_app.py").write_text(HOSTILE.format(marker=str(marker)))
    return folder
