"""A data owner's node with a tiny model, and what a server asks of it."""

from pathlib import Path

import torch

from fedlora.code_digest import code_digest
from fedlora.config.load import load_node
from fedlora.config.method import FedIt, FedSb, Ffa
from fedlora.config.node import NodeConfig
from fedlora.deploy.node import DeployedNode
from fedlora.federation.absorb import start
from fedlora.methods import build
from fedlora.privacy.ledger import read_ledger
from fedlora.training.agreed import agreed_digest
from fedlora.training.load import load_model
from fedlora.transport.wire import decode_reply
from fedlora.values import LocalWork, Refusal, RefusalReason, TrainRequest
from tests.deploy.node_text import node_text


def node_config(folder: Path, model: Path, train: Path, participations: int = 2) -> NodeConfig:
    """Written to node.yaml in `folder`, where its ledger will lie too; replies leave at once."""
    path = folder / "node.yaml"
    text = node_text(folder, model, train, records=360, participations=participations)
    path.write_text(f"{text}reply_quantum_s: 0\n")
    return load_node(path)


def first_request(config: NodeConfig) -> TrainRequest:
    """Of an honest server, for a node of this config."""
    model = load_model(config.model, config.task, config.lora, tuple(config.classes), config.seed)
    methods = {"core": FedSb(name="fedsb", left="orthonormal"), "ab": FedIt(name="fedit")}
    state = start(
        model.shapes(),
        head=model.head(),
        lora_cfg=config.lora,
        method=build(methods.get(config.lora.trains, Ffa(name="ffa")), config.lora, 3),
        dtype=torch.float32,
    )
    return TrainRequest(
        run="r",
        base_model=agreed_digest(config),
        code=code_digest(),
        round=1,
        adapters=state.adapters,
        work=LocalWork(steps=2, learning_rate=1.0),
    )


def reason(frame: bytes) -> RefusalReason:
    """Of a frame that is a refusal."""
    reply = decode_reply(frame)
    assert isinstance(reply, Refusal)
    return reply.reason


def debits(config: NodeConfig) -> int:
    """How many participations its ledger holds."""
    path = Path(config.ledger)
    return len(read_ledger(path).debits) if path.exists() else 0


def without_records(config: NodeConfig) -> DeployedNode:
    """The node, but it fails as soon as it looks for a record."""
    data = config.data.model_copy(update={"train": "/nowhere/records.tsv"})
    return DeployedNode(config.model_copy(update={"data": data}))
