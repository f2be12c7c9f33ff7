"""Nodes that repeat a simulation of their run.yaml, as processes: for tests, and possible from a test only.

A node's noise comes from the operating system, and neither node.yaml nor any option names another. Here a test puts
its own code in place of the command `fedlora`, and that changes the node before it runs the command as it is.
"""

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
import yaml
from torch import Tensor

from fedlora.cli import app
from fedlora.config.load import load_config
from fedlora.config.schema import RunConfig
from fedlora.data import load_corpus
from fedlora.data.partition import partition
from fedlora.deploy.node import DeployedNode
from fedlora.privacy.noise import SEEDED, SeededNoise
from fedlora.seeds import seed_for
from fedlora.training.client import Node
from tests.deploy.federation import Federation

SEEDED_NODE = "from tests.deploy.seeded import main; raise SystemExit(main())"
"""For `start_executor`: `fedlora node` with the draws and the noise of a simulation."""


class SimulatedNoise:
    """What a client of a simulation of the same config would draw.

    A simulation's run is named by its config; a server adds a few random digits to that, since its run cannot be
    repeated. They are left out here, or they would be in the key of every stream.
    """

    kind = SEEDED

    def __init__(self, seed: int) -> None:
        self._source = SeededNoise(seed_for(seed, "client randomness"))

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype, purpose: tuple[str | int, ...]) -> Tensor:
        """See NoiseSource."""
        return self._source.normal(shape, dtype=dtype, purpose=_simulated(purpose))

    def uniform(self, count: int, *, purpose: tuple[str | int, ...]) -> Tensor:
        """See NoiseSource."""
        return self._source.uniform(count, purpose=_simulated(purpose))


def main() -> int:
    """The command line `fedlora`, in a process whose nodes are simulated ones in all that decides an update's bits.

    Ledger and outbox stay what they are with real noise, so that a retry is paid here as it is there.
    """
    real = DeployedNode.__dict__["_node"].func
    seeded = cached_property(lambda node: simulated(real(node), node.config.seed))
    seeded.__set_name__(DeployedNode, "_node")
    DeployedNode._node = seeded  # pyright: ignore[reportAttributeAccessIssue]
    return app.main()


def simulated(node: Node, seed: int) -> Node:
    """A deployed node's client as a simulation has it: seeded, and records of a wide model share a batch.

    Each by itself, as a node has them, their gradients are rounded otherwise in the last bit. A narrow model's run by
    themselves in a simulation too: there the noise is all that differs.
    """
    return replace(node, noise=SimulatedNoise(seed), alone=node.model.peft_model.dtype.itemsize < 4)


def deal_out(federation: Federation) -> RunConfig:
    """Each node is told to be one client of the run.yaml that the server has: its records, terms, name and seed."""
    config = load_config(federation.config)
    assert config.privacy != "none" and config.data.source == "files"
    corpus = load_corpus(config.data, config.task, config.seed)
    parts = partition(corpus.train, config.data.partition, config.seed)
    header, *lines = Path(config.data.train).read_text().splitlines(keepends=True)
    privacy, work = config.privacy.model_dump(mode="json"), config.federation.model_dump(mode="json")
    for path, (client, part) in zip(federation.nodes, sorted(parts.items()), strict=True):
        train = path.with_name("train.tsv")
        train.write_text(header + "".join(lines[record] for record in part))
        told = yaml.safe_load(path.read_text())
        told["data"]["train"] = str(train)
        told |= {"client": client, "declared_records": len(part), "classes": list(corpus.classes)}
        told |= {"seed": config.seed, "model": config.model.model_dump(mode="json"), "device": "cpu"}
        told["work"] = {name: work[name] for name in ("batch_size", "local_steps", "optimizer")}
        budget = ("target_epsilon", "target_delta", "max_participations", "accountant")
        told["budget"] = {name: privacy[name] for name in budget}
        told |= {name: privacy[name] for name in ("max_grad_norm", "evaluation_noise")}
        path.write_text(yaml.safe_dump(told))
    if federation.kit is not None:
        _rename_keys(federation.kit / "nodes.json", sorted(parts))
    return config


def _rename_keys(nodes: Path, clients: list[str]) -> None:
    """A key's name is the only client that its node can be."""
    held = json.loads(nodes.read_text())
    for node, client in zip(held["nodes"], clients, strict=True):
        node["name"] = client
    nodes.write_text(json.dumps(held))


def _simulated(purpose: tuple[str | int, ...]) -> tuple[str | int, ...]:
    kind, run, *rest = purpose
    return (kind, str(run).partition("-")[0], *rest)
