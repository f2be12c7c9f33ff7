"""Certificates and keys that are wrong, or end under way: nobody gets in for another, and a renewal loses nothing."""

import json
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedlora.deploy.superlink import SuperLink, SuperLinkAwayError
from fedlora.errors import ConfigError
from fedlora.provision.provision import provision
from tests.deploy.federation import NODE, Federation, node_command
from tests.deploy.processes import free_port, node_yaml
from tests.faults.running import run_yaml
from tests.provision.handshakes import answering, handshakes

DAY = timedelta(days=1)


def in_plain_text(connection: socket.socket) -> None:
    """What a proxy without TLS says."""
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")


def trusting(kit: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(kit / "ca.crt"))


@pytest.mark.fault("F41")
@pytest.mark.parametrize(
    ("fault", "words", "mend"),
    [
        ("expired", "certificate has expired", "fedlora provision DIR --renew"),
        ("not yet valid", "certificate is not yet valid", "compare the clocks"),
        ("wrong name", "mismatch|not valid for", "--server-name"),
        ("wrong authority", "unable to get local issuer|self.signed", "--root-certificates"),
    ],
)
def test_a_server_ends_with_the_reason_at_a_superlink_whose_certificate_it_cannot_trust(
    tmp_path, fault, words, mend
):
    now = datetime.now(UTC)
    kit, trusted = tmp_path / "kit", tmp_path / "kit"
    provision(kit, nodes=1, now=now - 10 * DAY if fault == "expired" else now, days=5)
    if fault == "not yet valid":
        provision(kit, nodes=None, now=now + 10 * DAY, days=5, renew=True)
    if fault == "wrong authority":
        trusted = tmp_path / "other"
        provision(trusted, nodes=1, now=now)
    host = "127.0.0.2" if fault == "wrong name" else "127.0.0.1"
    with handshakes(kit / "server.crt", kit / "server.key", host) as port:
        link = SuperLink(address=f"{host}:{port}", tls=trusting(trusted))
        with link.connected() as desk, pytest.raises(ConfigError, match=words) as raised:
            desk.runs()
    assert "is not trusted" in str(raised.value) and mend in str(raised.value)


@pytest.mark.fault("F41")
def test_a_superlink_that_speaks_plain_text_is_told_no_secret_and_is_waited_for_with_the_reason(tmp_path):
    provision(tmp_path / "kit", nodes=1, now=datetime.now(UTC))
    with answering(in_plain_text) as port:
        link = SuperLink(address=f"127.0.0.1:{port}", tls=trusting(tmp_path / "kit"), secret=b"s" * 32)
        with link.connected() as desk, pytest.raises(SuperLinkAwayError, match="SSL"):
            desk.acquire()


@dataclass
class Kitted:
    """A federation of node-1 and node-2, whose kit has a third key."""

    federation: Federation
    server: "subprocess.Popen[bytes]"


@pytest.fixture(scope="module")
def kitted(tmp_path_factory, tiny_encoder, topic_files) -> Iterator[Kitted]:
    folder = tmp_path_factory.mktemp("kitted")
    run_yaml(folder, tiny_encoder, topic_files)
    provision(folder / "kit", nodes=3, now=datetime.now(UTC))
    federation = Federation(folder, topic_files[0], kit=folder / "kit", rounds=60, deadline_s=10)
    try:
        server = federation.serve()
        federation.start_link()
        federation.wait(lambda: "registered: node-1, node-2, node-3" in federation.said(), 120)
        yield Kitted(federation, server)
    finally:
        if federation.processes.started["server"].poll() is None:
            federation.processes.started["server"].kill()
        federation.stop()


@pytest.mark.slow
@pytest.mark.fault("F43")
def test_a_node_with_another_ones_registered_key_is_not_taken_for_the_client_that_it_says_it_is(
    kitted, topic_files
):
    federation = kitted.federation
    kit, port, folder = federation.kit, free_port(), federation.folder
    federation.start_supernode(1)
    federation.start_executor(1)
    federation.processes.start(
        "supernode-impostor", "flower-supernode", f"--root-certificates={kit / 'ca.crt'}",
        f"--auth-supernode-private-key={kit / 'node-3.key'}", "--superlink", f"127.0.0.1:{federation.link}",
        "--port", str(port), "--isolation", "process",
    )  # fmt: skip
    impostor = node_yaml(folder / "impostor", "node-1", federation.run, topic_files[0], 63)
    federation.processes.start("executor-impostor", *node_command(impostor, port, code=NODE))
    log = federation.run_dir / "server.log"
    federation.wait(lambda: log.exists() and "the node with the key of 'node-3'" in log.read_text(), 120)
    assert federation.rounds() == []
    # The real one gets in beside it, and is the only one that is asked for anything.
    federation.start_supernode(0)
    federation.start_executor(0)
    federation.wait(lambda: 1 in federation.rounds(), 120)
    assert federation.lines()[1]["answered"] == ["node-1", "node-2"]
    assert not impostor.with_name("ledger.jsonl").exists()
    for name in ("executor-impostor", "supernode-impostor"):
        federation.processes.started[name].send_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.fault("F42")
def test_a_certificate_that_has_ended_is_renewed_and_the_run_goes_on_where_it_was(kitted):
    federation, kit = kitted.federation, kitted.federation.kit
    series = json.loads((federation.run_dir / "submitted.json").read_text())["series"]
    # Who is connected notices nothing; whoever connects anew does, and after a restart that is everybody.
    provision(kit, nodes=None, now=datetime.now(UTC) - 2 * DAY, days=1, renew=True)
    federation.kill("link")
    federation.start_link()
    federation.wait(lambda: kitted.server.poll() is not None, 120)
    assert kitted.server.returncode == 2 and "certificate has expired" in federation.said()
    newest = max(federation.rounds())
    provision(kit, nodes=None, now=datetime.now(UTC), renew=True)
    federation.kill("link")
    federation.start_link()
    kitted.server = federation.serve("again")

    def goes_on() -> bool:
        # A SuperNode that meets a bad certificate ends. Started anew it is refused until Flower has noticed that it
        # was gone, and then started again, as a container would be.
        for number in range(2):
            if federation.processes.started[f"supernode-{number}"].poll() is not None:
                federation.start_supernode(number)
        return all(max(paid) > newest for paid in paid_rounds())

    def paid_rounds() -> list[list[int]]:
        return [[debit.round for debit in federation.ledger(number).debits] for number in range(2)]

    federation.wait(goes_on, 240)
    assert federation.rounds() == list(range(len(federation.rounds())))
    assert json.loads((federation.run_dir / "submitted.json").read_text())["series"] == series
    for paid in paid_rounds():
        assert len(paid) == len(set(paid))
