"""A real federation on loopback: SuperLink, two SuperNodes, executors and the two apps, to the end."""

import json

import pytest
import yaml

from fedlora.privacy.ledger import read_ledger
from tests.deploy.processes import PROJECT, free_port, healthy, node_yaml, until

pytestmark = pytest.mark.slow  # each message starts a process that imports torch


def test_two_nodes_train_two_rounds_and_their_ledgers_say_what_the_server_reports(
    processes, tmp_path, tiny_encoder, topic_files, tiny_config
):
    link, *ports = [free_port() for _ in range(3)]
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
    until(lambda: healthy(link), 60, processes)
    processes.start(
        "executor", "flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{link}",
        FEDLORA_CONFIG=str(tmp_path / "run.yaml"),
    )  # fmt: skip
    for number, port in enumerate(ports):
        node = node_yaml(tmp_path / f"node-{number}", f"site-{number}", run, topic_files[0])
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
    until(finished.exists, 240, processes)

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
