"""Processes told to stop, a SuperLink without descriptors or with a locked database: rounds go on afterwards."""

import http.client
import json
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.deploy.processes import healthy
from tests.faults.running import GRACE_S, NEAR, OTHER, Running, started

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.slow

LOCKED_S = 8.0
"""Longer than the 5 s that Flower waits for a lock of its database."""
SPARE = 8
"""Descriptors that are left to a SuperLink: too few for whoever comes."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_encoder, topic_files) -> Iterator[Running]:
    yield from started(tmp_path_factory.mktemp("stoppages"), tiny_encoder, topic_files)


@pytest.fixture
def running(federation) -> Iterator[Running]:
    """As it is before and after each fault: nothing is broken."""
    assert federation.violations() == []
    yield federation
    assert federation.violations() == []


@pytest.mark.fault("F50")
def test_a_node_that_is_told_to_stop_ends_with_status_zero_and_goes_on_when_started_again(running):
    federation = running.federation
    running.settle()
    for name in ("executor", "supernode"):
        assert running.restart(f"{name}-{NEAR}") == 0, federation.processes.logs()
        # Whatever was paid for is whole: an answer that is recorded, and no part of a file.
        assert running.released() == running.paid()
        assert [*federation.nodes[NEAR].parent.rglob("*.part*")] == []
        running.goes_on()
    assert federation.said().count("submitted, in series") == 1


@pytest.mark.fault("F50")
def test_a_superlink_and_a_server_that_are_told_to_stop_are_followed_by_ones_that_go_on_in_the_same_series(
    running,
):
    federation, newest = running.federation, running.settle()
    series = json.loads((federation.run_dir / "submitted.json").read_text())["series"]
    # Flower's web server cleans up, and then ends by the signal that it got.
    for process, statuses in (
        (running.server, {0}),
        (federation.processes.started["link"], {0, -signal.SIGTERM}),
    ):
        process.send_signal(signal.SIGTERM)
        assert process.wait(GRACE_S) in statuses, federation.processes.logs()
    federation.start_link()
    running.serve("again")
    running.goes_on()
    assert running.committed() > newest
    # A round that nobody could answer within its few seconds ends the run, and another one of the series goes on.
    assert federation.said("again").count("submitted, in series") <= 1
    assert json.loads((federation.run_dir / "submitted.json").read_text())["series"] == series


@pytest.mark.fault("F53")
def test_a_superlink_out_of_descriptors_keeps_who_is_there_and_takes_others_when_it_has_some_again(running):
    link, newest = running.federation.processes.started["link"].pid, running.committed()
    before = resource.prlimit(link, resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        kept = stack.enter_context(
            closing(http.client.HTTPConnection("127.0.0.1", running.federation.link, timeout=30))
        )
        assert _answers(kept)
        used = len([*Path(f"/proc/{link}/fd").iterdir()])
        resource.prlimit(link, resource.RLIMIT_NOFILE, (used + SPARE, before[1]))
        try:
            for _ in range(8 * SPARE):
                crowd = stack.enter_context(socket.socket())
                crowd.setblocking(False)
                crowd.connect_ex(("127.0.0.1", running.federation.link))
            running.wait(lambda: len([*Path(f"/proc/{link}/fd").iterdir()]) >= used + SPARE - 1)
            assert not healthy(running.federation.link)
            assert _answers(kept)
        finally:
            resource.prlimit(link, resource.RLIMIT_NOFILE, before)
    running.wait(lambda: healthy(running.federation.link))
    assert running.federation.processes.started["link"].poll() is None
    running.goes_on()
    assert running.committed() > newest


@pytest.mark.fault("F54")
def test_a_database_that_somebody_else_locks_for_long_stops_nothing_for_good(running):
    before = _submissions(running)
    running.settle()
    with closing(sqlite3.connect(running.federation.folder / "state.db", timeout=30)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        running.within(LOCKED_S, lambda: False)
        writer.rollback()
    # One answer 500 ends a SuperNode (flwr 1.41), and whoever keeps it going starts it again.
    for number in (NEAR, OTHER):
        running.restart(f"supernode-{number}")
    for number in (NEAR, OTHER):
        running.goes_on(number)
    assert _submissions(running) <= before + 1


@pytest.mark.fault("F50", "F53", "F54")
def test_after_all_stoppages_the_journal_gives_the_same_model_bit_for_bit(federation):
    federation.end()
    assert federation.violations() == []
    assert federation.replays()


def _submissions(running: Running) -> int:
    return sum(running.federation.said(name).count("submitted, in series") for name in ("server", "again"))


def _answers(connection: http.client.HTTPConnection) -> bool:
    """Over a connection that is there already."""
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    return answer.status == 200
