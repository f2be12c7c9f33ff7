"""A clock that is wrong or jumps: deadlines do not care, a signature does, and `fedlora doctor` says so."""

import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path

import pytest

from fedlora.deploy.superlink import SuperLink
from fedlora.doctor import server as doctor_server
from fedlora.doctor.server import Address, server_lines
from fedlora.provision.node_keys import nodes_to_register
from fedlora.provision.provision import provision
from tests.deploy.processes import Processes, free_port, until
from tests.lanes import mostly_slow
from tests.runtime.test_flower import cohort_of, federation, honest, request, slow_first

DAY_S = 86_400.0
DEADLINE_S = 0.5
CLOCKS = {"slow": (-100.0, "warn"), "ahead": (8.0, "fail"), "far behind": (-400.0, "fail")}
"""How far ahead of the server a node's clock is, and what its doctor makes of that."""
OTHER_CLOCK = """
import datetime, sys
from flwr.supercore import date
real, apart = date.now, datetime.timedelta(seconds=float(sys.argv.pop(1)))
date.now = lambda: real() + apart
from flwr.supernode.cli import flower_supernode
flower_supernode()
"""
"""A SuperNode on a machine whose clock is so many seconds ahead: Flower asks this one function what time it is."""


@pytest.fixture
def processes(tmp_path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.stop()


@pytest.mark.fault("F40")
@pytest.mark.parametrize("jump_s", mostly_slow([DAY_S, -400.0, -DAY_S, 8.0], DAY_S, -400.0))
def test_a_round_ends_by_its_deadline_however_the_wall_clock_jumps(monkeypatch, jump_s):
    real, began = time.time, time.monotonic()
    # From the first moment on it is right, and wrong by so much a little later.
    monkeypatch.setattr(
        time, "time", lambda: real() + (jump_s if time.monotonic() > began + DEADLINE_S / 5 else 0)
    )
    late = partial(slow_first, "site-0", 4 * DEADLINE_S)
    with federation([late, partial(honest, "site-1")]) as grid:
        cohort = cohort_of(grid, clients=2, deadline_s=DEADLINE_S)
        began = time.monotonic()
        first = list(cohort.ask(["site-0", "site-1"], request(1)))
        spent_s = time.monotonic() - began
        assert [(reply.client, reply.round) for reply in first] == [("site-1", 1)]
        # The slow one was waited for, and not until it answered.
        assert DEADLINE_S <= spent_s < 4 * DEADLINE_S
        cohort.deadline_s = 60.0
        second = list(cohort.ask(["site-0", "site-1"], request(2)))
    assert sorted((reply.client, reply.round) for reply in second) == [("site-0", 1), ("site-1", 2)]


@pytest.mark.slow
@pytest.mark.fault("F40")
def test_a_node_whose_clock_is_refused_is_told_by_doctor_that_it_is_the_clock(
    tmp_path, processes, monkeypatch
):
    kit, port, secret = tmp_path / "kit", free_port(), tmp_path / "secret"
    provision(kit, nodes=len(CLOCKS), now=datetime.now(UTC))
    secret.write_bytes(b"s" * 32)
    _superlink(processes, kit, port, secret)
    until(lambda: _answers(port), 60, processes)
    _register(kit, port, secret)
    for number, (name, (apart_s, _)) in enumerate(CLOCKS.items()):
        _supernode(processes, name, kit, port, f"node-{number + 1}", apart_s)
    for name, (apart_s, state) in CLOCKS.items():
        if state == "fail":
            # All that Flower says there is "terminated gracefully".
            until(lambda name=name: processes.started[name].poll() is not None, 60, processes)
            assert "SuperNode ID" not in _said(tmp_path, name)
        else:
            until(lambda name=name: "SuperNode ID" in _said(tmp_path, name), 60, processes)
            assert processes.started[name].poll() is None
        monkeypatch.setattr(doctor_server, "datetime", _clock(apart_s))
        address = Address(host="localhost", port=port, roots=kit / "ca.crt")
        lines = {line.name: line for line in server_lines(address)}
        assert lines["certificate"].state == "ok" and lines["server"].state == "ok"
        assert lines["clock"].state == state, (name, lines["clock"])
        assert state == "ok" or "NTP" in lines["clock"].mend


def _clock(apart_s: float) -> type[datetime]:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=apart_s)

    return Clock


def _superlink(processes: Processes, kit: Path, port: int, secret: Path) -> None:
    processes.start(
        "link", "flower-superlink", "--enable-supernode-auth", f"--ssl-ca-certfile={kit / 'ca.crt'}",
        f"--ssl-certfile={kit / 'server.crt'}", f"--ssl-keyfile={kit / 'server.key'}", "--port", str(port),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret),
        "--disable-runtime-dependency-installation",
    )  # fmt: skip


def _register(kit: Path, port: int, secret: Path) -> None:
    tls = ssl.create_default_context(cafile=str(kit / "ca.crt"))
    link = SuperLink(address=f"localhost:{port}", tls=tls, secret=secret.read_bytes())
    with link.connected() as desk:
        for name, key in nodes_to_register(kit / "nodes.json").items():
            assert desk.register(name, key)


def _supernode(processes: Processes, name: str, kit: Path, port: int, key: str, apart_s: float) -> None:
    processes.start(
        name, "python", "-c", OTHER_CLOCK, str(apart_s), f"--root-certificates={kit / 'ca.crt'}",
        f"--auth-supernode-private-key={kit / f'{key}.key'}", "--superlink", f"localhost:{port}",
        "--port", str(free_port()), "--isolation", "process",
    )  # fmt: skip


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()
