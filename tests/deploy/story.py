"""What happens to a deployment in the compose test: it starts, loses processes, is flooded, and ends."""

import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.containers import Containers
from tests.deploy.deployment import RUN, Deployment
from tests.deploy.strangers import FLOOD

PROJECT = Path(__file__).parents[2]
KILLED, QUIET, ROUNDS = 4, 7, 10
"""The last round that a kill may have touched, the last one before the flood, and the last one."""
CLIENTS = {"node-1": "client-1", "node-2": "client-2", "node-3": "client-3"}
"""Name of the key and in the run -> service with the records."""
METRICS_PORT, STATUS_PORT = 9464, 9443


@dataclass
class Story:
    """What happened on the way, in seconds and bytes, for people to read too."""

    before: tuple[str, "subprocess.CompletedProcess[str]"]
    """The monitor's words, to Prometheus and to people, before there was a run."""
    seconds: dict[str, float] = field(default_factory=dict)
    flood: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """The most that was seen of each service, when it was quiet and under the flood."""


def live(federation: Deployment) -> Story:
    """The run is over. A SuperNode, an executor and the server were killed on the way, then a stranger came."""
    federation.start("monitor")
    until(lambda: federation.is_healthy("monitor"), 120, federation, "the monitor is well")
    told = Story(before=(metrics(federation), status(federation)))
    began = time.monotonic()

    def done(what: str) -> None:
        told.seconds[what] = round(time.monotonic() - began, 1)

    federation.start()
    done("up")
    until(lambda: len(federation.rounds()) >= 1, 600, federation, "the first round")
    done("first round")
    _kill(federation)
    done("server killed")
    _watch(federation, told, "quiet", QUIET)
    done("quiet rounds")
    if isinstance(federation, Containers):
        with _stranger(federation, told):
            _watch(federation, told, "flood", ROUNDS)
        done("flood")
    until(lambda: bool(federation.read("server", f"{RUN}/adapter/README.md")), 900, federation, "the adapter")
    done("adapter")
    print(f"{told.seconds} s; load average {os.getloadavg()[0]:.1f}")
    return told


def _kill(federation: Deployment) -> None:
    """A SuperNode in round 2; then an executor at work, and the server with it. All of them are started again."""
    until(lambda: federation.debits("client-2") > 1, 240, federation, "node 2 is asked in round 2")
    federation.kill("node-2")
    until(lambda: federation.starts("node-2") > 0, 60, federation, "its SuperNode starts again")
    until(lambda: len(federation.rounds()) >= 2, 600, federation, "the second round")
    before = federation.debits("client-3")
    until(lambda: federation.debits("client-3") > before, 240, federation, "node 3 works")
    federation.kill("client-3")
    federation.kill("server")
    until(lambda: federation.starts("server") > 0, 60, federation, "the server starts again")


def _watch(federation: Deployment, told: Story, phase: str, last: int) -> None:
    """Round `last` is done; looked at with the same effort in each phase, since that makes rounds longer too."""
    most = told.memory.setdefault(phase, {})

    def is_over() -> bool:
        if isinstance(federation, Containers):
            for service in ("proxy", "superlink"):  # those that hear strangers
                most[service] = max(most.get(service, 0), federation.memory(service))
        return len(federation.rounds()) >= last

    until(is_over, 1200, federation, f"the rounds up to {last}", every=3.0)


@contextmanager
def _stranger(federation: Containers, told: Story) -> Iterator[None]:
    """Somebody holds all that one address can of the published port."""
    host, port = federation.address("proxy", 8443).split(":")
    command = [sys.executable, "-c", FLOOD, host, port, str(federation.roots)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        try:
            assert stranger.stdout.readline(), "the stranger failed"
            yield
            told.flood = json.loads(stranger.communicate(timeout=120)[0])
        finally:
            stranger.kill()


def until(
    is_so: Callable[[], bool], seconds: float, federation: Deployment, what: str, *, every: float = 0.5
) -> None:
    """Fails with every log unless it comes true in time."""
    ends = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > ends:
            services = ("superlink", "server", "monitor", *CLIENTS, *CLIENTS.values())
            said = "\n".join(f"--- {name}\n{federation.said(name)[-1500:]}" for name in services)
            log = federation.read("server", f"{RUN}/server.log")[-3000:]
            pytest.fail(f"not within {seconds:.0f} s: {what}\n{said}\n--- {RUN}/server.log\n{log}")
        time.sleep(every)


def status(federation: Deployment) -> "subprocess.CompletedProcess[str]":
    """`fedlora status --server` as a person on this machine asks."""
    where = [
        "--server",
        federation.address("monitor", STATUS_PORT),
        "--root-certificates",
        str(federation.roots),
    ]
    command = [sys.executable, "-m", "fedlora.cli.app", "status", *where, "--format", "json"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def metrics(federation: Deployment) -> str:
    """What Prometheus on this machine reads."""
    tls = ssl.create_default_context(cafile=str(federation.roots))
    address = f"https://{federation.address('monitor', METRICS_PORT)}/metrics"
    with urllib.request.urlopen(address, context=tls, timeout=30) as answer:
        return answer.read().decode()
