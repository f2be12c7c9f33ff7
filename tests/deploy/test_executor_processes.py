"""`fedlora node` as the process that it is: one for a ledger, one over all rounds, gone within seconds when told to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedlora.privacy.ledger import read_ledger
from tests.deploy.federation import hostile_app, node_command
from tests.deploy.node_text import node_text
from tests.deploy.nodes import node_config
from tests.deploy.processes import PROJECT, Processes, free_port, healthy, node_yaml, until


def test_neither_a_core_dump_nor_a_debugger_gets_at_the_memory():
    code = (
        "import ctypes, resource\nfrom fedlora.deploy.supernode import forbid_core_dumps\n"
        "forbid_core_dumps()\nprint(*resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3))"
    )  # 3: PR_GET_DUMPABLE
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == ["0", "0", "0"]


def test_a_wrong_node_yaml_ends_it_with_file_line_and_key(tmp_path):
    node = tmp_path / "node.yaml"
    node.write_text(f"client: site-0\nledger: {tmp_path}/ledger.jsonl\nlegder: typo\n")
    failed = subprocess.run(
        [sys.executable, *node_command(node, 1)[1:]], cwd=PROJECT, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert f"{node}:3: legder:" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--secret-file", "none/such"), "--secret-file none/such: no such folder"),
        (("--root-certificates", "README.md"), "--root-certificates README.md: no certificates"),
        (("--supernode", "http://127.0.0.1"), "not HOST:PORT"),
    ],
)
def test_a_wrong_option_ends_it_with_one_line(tmp_path, tiny_encoder, topic_files, options, words):
    node_config(tmp_path, tiny_encoder, topic_files[0])
    failed = subprocess.run(
        [sys.executable, *node_command(tmp_path / "node.yaml", 1, *options)[1:]],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1
    assert words in failed.stderr


@pytest.mark.fault("F39")
def test_a_second_executor_of_a_ledger_is_refused_and_the_first_leaves_with_status_zero(
    processes, tmp_path, tiny_encoder, topic_files
):
    node_config(tmp_path, tiny_encoder, topic_files[0])
    node = tmp_path / "node.yaml"
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    processes.start("first", *node_command(node, free_port()))
    until(lambda: "waiting for the SuperNode" in first.read_text(), 60, processes)
    process = processes.started["first"]
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "core" in line).split()[4:6] == ["0", "0"]

    processes.start("second", *node_command(node, free_port()))
    assert processes.started["second"].wait(60) == 2
    assert "ledger.jsonl.lock is held by another process" in second.read_text()
    assert len(second.read_text().splitlines()) == 1

    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert first.read_text().count("waiting for the SuperNode") == 1


def test_it_loads_its_model_while_the_supernode_has_no_secret_yet_and_stops_when_told_to(
    processes, tmp_path, tiny_encoder, topic_files
):
    node_config(tmp_path, tiny_encoder, topic_files[0])
    secret, said = tmp_path / "secret", tmp_path / "executor.log"
    command = node_command(tmp_path / "node.yaml", free_port(), "--secret-file", str(secret))
    processes.start("executor", *command)
    until(lambda: "waiting for --secret-file" in said.read_text(), 60, processes)
    assert "loaded in" in said.read_text()
    secret.write_bytes(b"s")
    until(lambda: "waiting for the SuperNode" in said.read_text(), 60, processes)
    assert said.read_text().count("waiting for --secret-file") == 1
    processes.started["executor"].send_signal(signal.SIGTERM)
    assert processes.started["executor"].wait(30) == 0


def test_a_model_that_is_not_there_ends_it_at_once(processes, tmp_path, topic_files):
    node = tmp_path / "node.yaml"
    node.write_text(node_text(tmp_path, "no/such", topic_files[0], records=360))
    processes.start("executor", *node_command(node, free_port()))
    assert processes.started["executor"].wait(60) == 2
    said = (tmp_path / "executor.log").read_text()
    assert f"{node}: model.name 'no/such'" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_one_process_answers_all_rounds_runs_no_code_of_the_servers_and_outlives_its_supernode(
    processes, tmp_path, tiny_encoder, topic_files, tiny_config
):
    tiny_config()  # leaves run.yaml here
    run = yaml.safe_load((tmp_path / "run.yaml").read_text())
    run["federation"] |= {"rounds": 3, "deadline_s": 15}
    run["data"]["partition"] = {"kind": "iid", "clients": 2}
    run["runtime"] = {"kind": "flower"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    secret, marker = tmp_path / "secret", tmp_path / "marker"
    secret.write_bytes(os.urandom(32))
    link, *ports = [free_port() for _ in range(3)]

    def supernode(number: int) -> None:
        processes.start(
            f"node-{number}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}",
            "--port", str(ports[number]), "--isolation", "process", "--superexec-auth-secret-file", str(secret),
        )  # fmt: skip

    processes.start(
        "link", "flower-superlink", "--insecure", "--port", str(link), "--isolation", "process",
        "--database", str(tmp_path / "state.db"), "--disable-runtime-dependency-installation",
    )  # fmt: skip
    until(lambda: healthy(link), 60, processes)
    processes.start(
        "server", "flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{link}",
        FEDLORA_CONFIG=str(tmp_path / "run.yaml"),
    )  # fmt: skip
    for number, port in enumerate(ports):
        supernode(number)
        node = node_yaml(tmp_path / f"node-{number}", f"site-{number}", run, topic_files[0])
        processes.start(f"executor-{number}", *node_command(node, port, "--secret-file", str(secret)))
    _submit(processes, tmp_path, link, hostile_app(tmp_path / "app", marker))
    rounds, said = tmp_path / "run" / "rounds.jsonl", tmp_path / "executor-1.log"
    until(lambda: rounds.exists() and '"round": 1' in rounds.read_text(), 120, processes)
    os.killpg(processes.started["node-1"].pid, signal.SIGKILL)
    until(lambda: said.read_text().count("waiting for the SuperNode") == 1, 30, processes)
    supernode(1)
    until(lambda: said.read_text().count("'query.hello' message answered") == 2, 60, processes)
    until((tmp_path / "run" / "adapter" / "README.md").exists, 240, processes)

    assert not marker.exists()
    for number in range(2):
        log = (tmp_path / f"executor-{number}.log").read_text()
        assert log.count(f"model {tiny_encoder} loaded") == 1
        process = processes.started[f"executor-{number}"]
        assert process.poll() is None, "not the process that was started"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert (tmp_path / "executor-0.log").read_text().count("'train' message answered") == 3
    assert len(read_ledger(tmp_path / "node-0" / "ledger.jsonl").debits) == 3


def _submit(processes: Processes, folder: Path, link: int, app: Path) -> None:
    home = folder / "home-submit"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    processes.start("submit", "flwr", "run", str(app), "here")
