"""What is deployed is thin, imports, and is valid as a Flower app and as a compose file."""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedlora.config.load import load_config, load_node

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("app", ["clients/client_app.py", "server/server_app.py"])
def test_an_app_is_an_address_of_less_than_40_lines(app):
    assert len((PROJECT / app).read_text().splitlines()) < 40


@pytest.mark.parametrize("module", ["clients.client_app", "server.server_app"])
def test_an_app_imports(module):
    subprocess.run([sys.executable, "-c", f"from {module} import app"], cwd=PROJECT, check=True)


def test_the_server_app_needs_no_command_line():
    code = "import sys, server.server_app; assert not [m for m in sys.modules if m.startswith('fedlora.cli')]"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def test_a_hello_needs_no_torch():
    code = (
        "import sys, clients.client_app as c; from types import SimpleNamespace as S\n"
        "print(c._greet(S())); assert 'torch' not in sys.modules"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={**os.environ, "FEDLORA_NODE": "clients/node.yaml", "FEDLORA_NODE_SET": "client=client-1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "client='client-1', records=810" in said


def test_the_bundle_holds_the_two_addresses_and_nothing_else():
    from flwr.cli.build import build_fab_from_disk

    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(PROJECT)))
    assert sorted(bundle.namelist()) == [
        ".info/CONTENT",
        "clients/client_app.py",
        "pyproject.toml",
        "server/server_app.py",
    ]


def test_the_demonstrations_configs_fit_each_other():
    node, run = load_node(PROJECT / "clients/node.yaml"), load_config(PROJECT / "server/run.yaml")
    assert (node.model, node.task, node.lora) == (run.model, run.task, run.lora)
    assert node.data.packages == run.data.packages == list(node.classes)
    assert node.data.partition == run.data.partition
    assert run.federation.local_steps <= node.work.local_steps
    assert run.federation.optimizer.lr <= node.work.optimizer.lr
    assert run.federation.rounds <= node.budget.max_participations


def test_the_compose_file_is_valid():
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not on this machine: the compose file was not checked")
    subprocess.run(["docker", "compose", "config", "-q"], cwd=PROJECT, check=True)
