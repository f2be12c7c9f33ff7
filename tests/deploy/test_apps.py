"""What is deployed is thin, imports, and is valid as a Flower app and as a compose file."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.config.data import Docstrings
from fedlora.config.load import load_config, load_node
from fedlora.config.node import NodeDocstrings

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
    assert "client='client-1', records=540" in said


def test_the_bundle_holds_the_two_addresses_and_nothing_else():
    from flwr.cli.build import build_fab_from_disk

    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(PROJECT)))
    assert sorted(bundle.namelist()) == [
        ".info/CONTENT",
        "clients/client_app.py",
        "pyproject.toml",
        "server/server_app.py",
    ]


def _services() -> dict[str, dict]:
    return yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("profile", ["", "-gpu"])
def test_the_demonstrations_configs_fit_each_other(number, profile):
    service = _services()[f"client-{number}{profile}"]
    words = [word.partition("=") for word in (*service["entrypoint"], *service["command"])]
    node = load_node(PROJECT / "clients/node.yaml", [value for key, _, value in words if key == "--set"])
    run = load_config(PROJECT / "server/run.yaml")
    assert isinstance(node.data, NodeDocstrings) and isinstance(run.data, Docstrings)
    # The key that `fedlora provision --nodes 3` registers is the node's name.
    assert (node.client, node.data.part) == (f"node-{number}", f"client-{number - 1}")
    assert (node.model, node.task, node.lora) == (run.model, run.task, run.lora)
    assert node.data.packages == run.data.packages == list(node.classes)
    assert node.data.partition == run.data.partition
    assert run.federation.local_steps <= node.work.local_steps
    assert run.federation.optimizer.lr <= node.work.optimizer.lr
    assert run.federation.rounds <= node.budget.max_participations
    assert node.mark is not None and Path(node.mark).parent != Path(node.ledger).parent


def test_every_service_is_without_rights_that_it_does_not_need():
    for name, service in _services().items():
        assert service["read_only"] and service["init"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["ulimits"] == {"core": 0}, name
        assert {"mem_limit", "pids_limit"} <= service.keys(), name
        if name != "keys":  # the one that may change a key's group: no network, and over at once
            assert service["user"] == "10001:10001" and "cap_add" not in service, name
            assert service["restart"] == "always", name


def test_nodes_are_on_no_network_of_the_superlinks_and_the_records_on_none_of_the_proxys():
    networks = {name: set(service.get("networks", ())) for name, service in _services().items()}
    internal = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["networks"]
    assert [name for name, network in internal.items() if not network] == ["outside", "watch"]
    for number in (1, 2, 3):
        assert networks[f"node-{number}"] == {f"fleet-{number}", f"site-{number}"}
        for client in (f"client-{number}", f"client-{number}-gpu"):
            assert networks[client] == {f"site-{number}"}
    assert networks["superlink"] == networks["server"] == {"operator"}
    assert networks["monitor"] == {"watch"}
    assert [name for name, mine in networks.items() if "watch" in mine] == ["monitor"]
    assert networks["proxy"] == {"operator", "outside", "fleet-1", "fleet-2", "fleet-3"}


def test_one_port_of_the_proxy_is_open_and_the_monitors_are_on_loopback():
    ports = {name: service["ports"] for name, service in _services().items() if "ports" in service}
    assert set(ports) == {"proxy", "monitor"} and len(ports["proxy"]) == 1
    assert all(":-127.0.0.1:" in port for port in ports["monitor"])


def test_the_monitor_sees_the_run_and_cannot_write_there():
    services = _services()
    (volume,) = services["monitor"]["volumes"]
    assert volume == f"{services['server']['volumes'][0]}:ro"


def test_each_node_has_keys_and_volumes_of_its_own():
    services = _services()
    for kind in ("node", "client"):
        names = [f"{kind}-{number}" for number in (1, 2, 3)]
        volumes = [{volume.partition(":")[0] for volume in services[name]["volumes"]} for name in names]
        assert sum(map(len, volumes)) == len(set.union(*volumes))
    keys = [services[f"node-{number}"]["secrets"] for number in (1, 2, 3)]
    assert keys == [["ca.crt", {"source": f"node-{n}.key", "target": "node.key"}] for n in (1, 2, 3)]
    holders = {name for name, service in services.items() if "server.key" in service.get("secrets", ())}
    assert holders == {"superlink", "proxy", "monitor"}


def test_each_node_has_a_device_of_its_own():
    services = _services()
    devices = [
        services[f"client-{number}-gpu"]["deploy"]["resources"]["reservations"]["devices"]
        for number in (1, 2, 3)
    ]
    assert [device["device_ids"] for (device,) in devices] == [["0"], ["1"], ["2"]]


def test_no_key_is_ever_sent_to_the_engine():
    first, *rest = [
        line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    assert first == "*"
    assert not [line for line in rest if line.startswith("!") and ("certs" in line or "*" in line)]


def _config(folder: Path, *words: str) -> dict[str, Any]:
    """The compose file as the engine would get it; no engine is needed for that."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not on this machine: the compose file was not checked")
    command = ["docker", "compose", *words, "config", "--format", "json"]
    told = {**os.environ, "FEDLORA_SERVER": "fl.example.org:8443", "FEDLORA_NODE": "hospital-a"}
    said = subprocess.run(command, cwd=folder, env=told, check=True, capture_output=True, text=True).stdout
    return json.loads(said)


@pytest.mark.parametrize("files", [(), ("-f", "docker-compose.yml", "-f", "docker-compose.dev.yml")])
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_compose_file_is_valid_and_its_overlay_for_development_stays_on_loopback(files, profile):
    services = _config(PROJECT, *files, "--profile", profile)["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    if files:
        assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
        assert not [name for name, service in services.items() if service.get("secrets")]
    else:
        assert [port["target"] for port in ports if port["host_ip"] != "127.0.0.1"] == [8443]


def test_a_node_on_another_host_is_as_closed_as_the_demonstrations():
    config = _config(PROJECT / "clients")
    services = config["services"]
    assert set(services) == {"keys", "node", "client"}
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "ports" not in service, name
    assert services["node"]["user"] == services["client"]["user"] == "10001:10001"
    assert set(services["client"]["networks"]) == {"site"} and config["networks"]["site"]["internal"]
    targets = {volume["target"] for volume in services["client"]["volumes"]}
    assert targets == {"/node.yaml", "/var/lib/fedlora", "/var/lib/fedlora-mark", "/data", "/run/site"}
    assert "--superlink=fl.example.org:8443" in services["node"]["command"]
    assert config["secrets"]["node.key"]["file"].endswith("clients/certs/hospital-a.key")


def test_ray_reports_to_nobody_from_any_process_that_imports_us():
    ask = "import fedlora, ray._common.usage.usage_lib as u; print(u.usage_stats_enabled())"
    clean = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    said = subprocess.run([sys.executable, "-c", ask], cwd=PROJECT, env=clean, capture_output=True, text=True)
    assert said.stdout.strip() == "False", said.stderr


def test_no_telemetry_is_on_by_default_whatever_is_imported_first():
    """Flower reads its switch once, at import."""
    ask = "import fedlora.deploy.executor, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    clean = {name: value for name, value in os.environ.items() if name != "FLWR_TELEMETRY_ENABLED"}
    said = subprocess.run([sys.executable, "-c", ask], cwd=PROJECT, env=clean, capture_output=True, text=True)
    assert said.stdout.strip() == "0", said.stderr
