"""A federation of real processes ends where the simulation of the same run.yaml does, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.config.load import config_digest, load_config, load_node
from fedlora.data.own import own_records
from fedlora.data.tokenise import fingerprint, tokenise
from fedlora.deploy.node import DeployedNode, own_terms
from fedlora.privacy.noise import OS_ENTROPY
from fedlora.runtime.host import Host
from fedlora.runtime.prepare import prepare
from fedlora.runtime.simulate import simulate
from fedlora.training.tokens import load_tokenizer
from tests.deploy.federation import Federation
from tests.deploy.seeded import SEEDED_NODE, deal_out, simulated


def quiet(event: object) -> None: ...


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(params=["float32", "bfloat16"])
def federation(request, tmp_path, topic_files, tiny_config) -> Iterator[Federation]:
    """Three unequal clients, two of them asked in a round: memory, weights and accuracies all depend on who is who."""
    tiny_config()  # leaves run.yaml here
    found = Federation(tmp_path, topic_files[0], nodes=3, weighting="examples")
    run = found.run
    run["model"]["dtype"] = request.param
    run["federation"]["cohort"] = 2
    run["method"]["stale"] = {"beta": 0.5}
    run["privacy"]["evaluation_noise"] = 4.0
    run["data"]["partition"] = {"kind": "dirichlet", "clients": 3, "alpha": 1.0, "min_examples": 40}
    found.config.write_text(yaml.safe_dump(run))
    deal_out(found)
    yield found
    found.stop()


def alike(federation: Federation, run_dir: Path):
    """The simulation of the server's own file, prepared; and the nodes by their names."""
    config = load_config(federation.config, ["runtime={kind: local}", f"output={run_dir}"])
    assert config_digest(config) == config_digest(load_config(federation.config))
    return config, {node.client: node for node in map(load_node, federation.nodes)}


def test_a_node_told_of_one_clients_part_has_its_records_terms_and_randomness(federation, tmp_path):
    config, nodes = alike(federation, tmp_path / "simulated")
    prepared = prepare(config, quiet)
    clients = prepared.clients
    tokenizer = load_tokenizer(config.model.name)
    assert nodes.keys() == clients.examples.keys()
    assert len({len(held) for held in clients.examples.values()}) > 1
    host = Host(prepared.save_for_hosts(tmp_path))
    for client, node in nodes.items():
        held = clients.examples[client]
        assert fingerprint(tokenise(own_records(node), tokenizer, node.data.max_length)) == fingerprint(held)
        sampling, mechanism = own_terms(node)
        terms = clients.terms[len(held)]
        assert (sampling, mechanism) == (terms.sampling, terms.mechanism)
        deployed, client_of_host = DeployedNode(node)._node, host._node(client)
        assert deployed.noise.kind == OS_ENTROPY and deployed.alone
        theirs = simulated(deployed, node.seed)
        for name in ("client", "declared_records", "alone", "evaluation_noise", "optimizer", "budget"):
            assert getattr(theirs, name) == getattr(client_of_host, name), name
        for named in ("draw", "noise", "accuracy"):
            streams = [
                source.uniform(3, purpose=(named, run, client, 1, 0)).tolist()
                for source, run in (
                    (theirs.noise, f"{host.setup.run}-0123abcd"),
                    (host.noise, host.setup.run),
                )
            ]
            assert streams[0] == streams[1]


@pytest.mark.slow
def test_nodes_with_seeded_noise_and_a_server_end_in_the_state_of_a_local_simulation(federation, tmp_path):
    config, _ = alike(federation, tmp_path / "simulated")
    expected = simulate(config, tmp_path / "simulated", quiet)
    federation.start_link()
    server = federation.serve()
    for number in range(len(federation.nodes)):
        federation.start_supernode(number)
        federation.start_executor(number, code=SEEDED_NODE)
    federation.end(server, 600)
    found = summary(federation.run_dir)
    assert found["state_sha256"] == summary(expected)["state_sha256"]
    lines = [json.loads(line) for line in (expected / "rounds.jsonl").read_text().splitlines()]
    for name in ("asked", "answered", "accuracy_told", "score", "loss"):
        assert [line[name] for line in federation.lines()] == [line[name] for line in lines], name
    assert found["epsilon_by_client"] == summary(expected)["epsilon_by_client"]
