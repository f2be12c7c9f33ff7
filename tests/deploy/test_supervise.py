"""`fedlora serve` as the process that it is: what dies is started again, nothing is paid or submitted twice."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fedlora.deploy.superlink import SuperLink, bundle
from fedlora.deploy.supernode_process import TURNED_AWAY
from fedlora.deploy.supervise import Supervisor
from fedlora.deploy.worker import Worker
from fedlora.errors import ConfigError, IncompleteError
from tests.deploy.federation import SERVE, Federation, hostile_app
from tests.deploy.processes import PROJECT, free_port, healthy


@pytest.fixture
def federation(tmp_path, topic_files, tiny_config) -> Iterator[Federation]:
    tiny_config()  # leaves run.yaml here
    found = Federation(tmp_path, topic_files[0])
    yield found
    found.stop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("federation:\n  ruonds: 3\n", "run.yaml:2: federation.ruonds"),
        (None, "--superlink '127.0.0.1': not HOST:PORT"),
    ],
)
def test_a_wrong_config_or_address_ends_it_with_one_line_and_status_two(tmp_path, tiny_config, change, words):
    tiny_config()
    config = tmp_path / "run.yaml"
    if change is not None:
        config.write_text(change)
    address = "127.0.0.1" if change is None else "127.0.0.1:1"
    failed = _call("serve", str(config), "--superlink", address)
    assert failed.returncode == 2
    assert (words in failed.stderr and len(failed.stderr.splitlines()) == 1) or change is not None
    assert "Traceback" not in failed.stderr


def test_a_finished_run_is_left_alone_whether_a_superlink_is_there_or_not(tmp_path, tiny_config):
    config = tiny_config()
    run_dir = Path(config.output)
    (run_dir / "adapter").mkdir(parents=True)
    (run_dir / "report.html").touch()
    (run_dir / "summary.json").write_text('{"rounds_completed": 3}')
    done = _call("serve", str(tmp_path / "run.yaml"), "--superlink", f"127.0.0.1:{free_port()}")
    assert done.returncode == 0, done.stderr
    assert not (run_dir / "submitted.json").exists()


def test_a_second_supervisor_is_refused_and_the_first_leaves_with_status_zero(federation):
    first = federation.serve("first")
    federation.wait(lambda: "waiting for the SuperLink" in federation.said("first"))
    second = federation.serve("second")
    assert second.wait(30) == 2
    assert "is served by another process" in federation.said("second")
    time.sleep(3)
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    assert federation.said("first").count("waiting for the SuperLink") == 1


@pytest.mark.slow
def test_with_tls_and_registered_nodes_a_run_is_submitted_once_and_finished(
    tmp_path, topic_files, tiny_config
):
    from datetime import UTC, datetime

    from fedlora.provision.provision import provision

    tiny_config()
    provision(tmp_path / "kit", nodes=2, now=datetime.now(UTC))
    federation = Federation(tmp_path, topic_files[0], kit=tmp_path / "kit")
    try:
        server = federation.serve()
        federation.wait(lambda: "waiting for the SuperLink" in federation.said())
        federation.start_link()
        federation.wait(lambda: "registered: node-1, node-2" in federation.said())
        federation.start_nodes()
        federation.finish(server)
        assert federation.said().count("submitted, in series") == 1
        assert server.args and federation.secret.read_bytes().hex() not in federation.said()
    finally:
        federation.stop()


@pytest.mark.slow
def test_a_key_that_is_gone_from_the_list_may_not_join_any_more(tmp_path, topic_files, tiny_config):
    from datetime import UTC, datetime

    from fedlora.provision.provision import provision

    tiny_config()
    kit = tmp_path / "kit"
    provision(kit, nodes=2, now=datetime.now(UTC))
    federation = Federation(tmp_path, topic_files[0], kit=kit)
    try:
        federation.start_link()
        server = federation.serve()
        federation.wait(lambda: "registered: node-1, node-2" in federation.said())
        register = json.loads((kit / "nodes.json").read_text())
        register["nodes"] = register["nodes"][:1]
        (kit / "nodes.json").write_text(json.dumps(register))
        federation.wait(lambda: "not registered any more: node-2" in federation.said())
        federation.start_supernode(1)
        assert federation.processes.started["supernode-1"].wait(60) != 0
        assert TURNED_AWAY in federation.said("supernode-1")
        assert server.poll() is None
    finally:
        federation.stop()


@pytest.mark.slow
@pytest.mark.fault("F1")
def test_a_server_process_killed_in_a_round_is_replaced_in_the_same_series_and_no_round_is_paid_twice(
    federation,
):
    federation.start_link()
    server = federation.serve()
    federation.start_nodes()
    federation.wait(lambda: 1 in federation.rounds())
    series = json.loads((federation.run_dir / "submitted.json").read_text())["series"]
    # The nodes train round 2 now, or have: their answers to the killed process are lost.
    federation.wait(lambda: federation.debits() == [2, 2], 30)
    killed = federation.worker()
    os.kill(killed, signal.SIGKILL)
    found = federation.wait(lambda: federation.said().count("submitted, in series") == 2, 30)
    back = federation.wait(lambda: 2 in federation.rounds(), 90)
    print(
        f"kill -9 of the server's process: submitted again after {found:.1f} s, round 2 done after {found + back:.1f} s"
    )
    assert federation.worker() != killed
    federation.finish(server)
    assert json.loads((federation.run_dir / "submitted.json").read_text())["series"] == series
    assert federation.said().count(f"submitted, in series {series}") == 2


@pytest.mark.slow
def test_a_supervisor_that_was_killed_or_stopped_is_followed_by_one_that_submits_nothing(federation):
    federation.start_link()
    server = federation.serve("first")
    federation.start_nodes()
    federation.wait(lambda: 0 in federation.rounds())
    worker = federation.worker()
    server.kill()
    server.wait(30)
    second = federation.serve("second")
    federation.wait(lambda: "following run" in federation.said("second"), 30)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 0
    third = federation.serve("third")
    federation.finish(third)
    assert federation.worker() == worker
    assert "submitted" not in federation.said("second") + federation.said("third")
    # Whatever died between the summary and the adapter: the adapter is written, and nothing is submitted.
    shutil.rmtree(federation.run_dir / "adapter")
    assert _call(*federation.arguments()[3:]).returncode == 0
    assert (federation.run_dir / "adapter" / "README.md").exists()
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
@pytest.mark.fault("F1")
def test_everything_on_the_servers_machine_killed_at_once_goes_on_at_the_same_round(federation):
    federation.start_link()
    server = federation.serve("first")
    federation.start_nodes()
    federation.wait(lambda: 1 in federation.rounds())
    for pid in (federation.worker(), server.pid, federation.processes.started["link"].pid):
        os.kill(pid, signal.SIGKILL)
    server.wait(30)
    federation.processes.started["link"].wait(30)
    again = federation.serve("again")
    federation.start_link()
    spent = federation.wait(lambda: 2 in federation.rounds(), 90)
    print(f"kill -9 of SuperLink, supervisor and process at once: round 2 done after {spent:.1f} s")
    federation.finish(again)


@pytest.mark.slow
def test_a_short_outage_of_the_superlink_costs_no_second_run(federation):
    federation.start_link()
    server = federation.serve()
    federation.start_nodes()
    federation.wait(lambda: 1 in federation.rounds())
    os.killpg(federation.processes.started["link"].pid, signal.SIGKILL)
    federation.wait(lambda: federation.said().count("waiting for the SuperLink") > 0, 30)
    time.sleep(5)
    federation.start_link()
    spent = federation.wait(lambda: 2 in federation.rounds(), 90)
    print(f"SuperLink away for 5 s: round 2 done {spent:.1f} s after its start")
    federation.finish(server)
    assert federation.said().count("submitted, in series") == 1


@pytest.mark.slow
def test_what_only_somebody_can_mend_ends_it_with_the_servers_own_words(federation):
    test, federation.run["data"]["test"] = federation.run["data"]["test"], "/nowhere/test.tsv"
    federation.config.write_text(yaml.safe_dump(federation.run))
    federation.start_link()
    server = federation.serve()
    assert server.wait(60) == 2, federation.processes.logs()
    last = federation.said().splitlines()[-1]
    assert str(federation.config) in last and "/nowhere/test.tsv" in last
    # Mended, the same command goes on: the failure of the last run is not held against it.
    federation.run["data"]["test"] = test
    federation.config.write_text(yaml.safe_dump(federation.run))
    mended = federation.serve("mended")
    federation.wait(lambda: "works on run" in federation.said("mended"), 30)
    assert mended.poll() is None


@pytest.mark.slow
@pytest.mark.fault("F54")
def test_a_strangers_run_is_stopped_unrun_and_ours_is_submitted_again_when_stopped_or_forgotten(federation):
    marker = federation.folder / "marker"
    app = _hostile_server(federation.folder / "app", marker)
    control = SuperLink(address=f"127.0.0.1:{federation.link}")
    federation.start_link()
    federation.wait(lambda: healthy(federation.link))
    with control.connected() as desk:
        stranger, _ = desk.submit(bundle(app, "stranger"), None)
        server = federation.serve()
        federation.wait(lambda: "works on run" in federation.said())
        assert f"run {stranger} is not the one" in federation.said()
        assert desk.run(stranger).finished and not marker.exists()  # type: ignore[union-attr]
        first = federation.worker()
        ours = json.loads((federation.run_dir / "submitted.json").read_text())
        desk.stop(ours["run"])
    federation.wait(lambda: federation.said().count("works on run") == 2, 60)
    assert federation.said().count(f"submitted, in series {ours['series']}") == 2
    assert federation.worker() != first

    os.killpg(federation.processes.started["link"].pid, signal.SIGKILL)
    for path in federation.folder.glob("state.db*"):
        path.unlink()
    federation.start_link()
    federation.wait(lambda: federation.said().count("works on run") == 3, 60)
    assert f"has forgotten series {ours['series']}" in federation.said()
    assert server.poll() is None


@pytest.mark.slow
def test_a_server_process_that_always_dies_is_given_up_with_one_message(federation):
    federation.start_link()
    federation.run_dir.mkdir()
    superlink = SuperLink(address=f"127.0.0.1:{federation.link}", secret=federation.secret.read_bytes())
    supervisor = Supervisor(
        federation.run_dir,
        superlink,
        worker=Worker(federation.run_dir, (sys.executable, "-c", "raise SystemExit(9)")),
        order=lambda token: {},
        bundle=lambda name: bundle(PROJECT, name),
        attempts=2,
    )
    with pytest.raises(IncompleteError, match="2 runs in a row ended without a new round"):
        supervisor.run()
    with superlink.connected() as desk:
        runs = desk.runs()
    assert len(runs) == 2
    assert runs[0].series_id == runs[1].series_id and runs[0].fab == runs[1].fab


@pytest.mark.slow
def test_a_round_that_every_budget_refuses_ends_it_with_status_three_and_status_says_who(federation):
    for node in federation.nodes:
        words = yaml.safe_load(node.read_text())
        words["budget"]["max_participations"] = 1
        node.write_text(yaml.safe_dump(words))
    federation.start_link()
    server = federation.serve()
    federation.start_nodes()
    federation.wait(lambda: server.poll() is not None, 120)
    assert server.returncode == 3, federation.processes.logs()
    assert federation.said().count("submitted, in series") == 1
    assert "round 2: 0 of 2 clients answered, 1 have to (budget: node-1, node-2)" in federation.said()
    told = _call("status", str(federation.run_dir)).stdout
    assert "  round 2        0 of 2 answered, too few; budget: node-1, node-2" in told
    assert federation.debits() == [1, 1]


def test_a_bundle_holds_the_entry_points_alone_and_is_the_same_for_the_same_name():
    first = bundle(PROJECT, "a")
    names = zipfile.ZipFile(io.BytesIO(first)).namelist()
    assert names == ["pyproject.toml", "clients/client_app.py", "server/server_app.py", ".info/CONTENT"]
    assert first == bundle(PROJECT, "a") != bundle(PROJECT, "b")


@pytest.mark.parametrize("content", [None, "[project", "[project]\nname = 'x'\n", "[tool.flwr.app]\n"])
def test_a_directory_that_is_no_app_is_refused_by_name(tmp_path, content):
    says = "no pyproject.toml is there, .* no node's key was registered" if content is None else ""
    if content is not None:
        (tmp_path / "pyproject.toml").write_text(content)
    with pytest.raises(ConfigError, match=f"--app {tmp_path}: {says}"):
        bundle(tmp_path, "a")


def _hostile_server(folder: Path, marker: Path) -> Path:
    """The project's own app, but for a server app that leaves a mark wherever it is imported."""
    app = hostile_app(folder, marker)
    (app / "server" / "server_app.py").write_text((app / "clients" / "client_app.py").read_text())
    return app


def _call(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SERVE, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=90
    )
