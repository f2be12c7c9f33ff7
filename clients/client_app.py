"""The Flower ClientApp of a data owner's node: decode, answer, encode.

FEDLORA_NODE is the path of node.yaml; FEDLORA_NODE_SET may hold `key=value` overrides. Without it, a simulation's node.
"""

import os

from flwr.app import Context

from fedlora.config.load import load_node
from fedlora.config.node import NodeConfig
from fedlora.transport.flower_client import Hello, client_app
from fedlora.values import Witness


def _config() -> NodeConfig | None:
    path = os.environ.get("FEDLORA_NODE")
    return None if path is None else load_node(path, os.environ.get("FEDLORA_NODE_SET", "").split())


def _greet(context: Context) -> Hello:
    if (config := _config()) is None:
        from fedlora.runtime import flwr_run

        return flwr_run.greet(context)
    return Hello(client=config.client, records=config.declared_records, classes=tuple(config.classes))


def _answer(context: Context, frame: bytes, echo: Witness | None) -> bytes:
    if (config := _config()) is None:
        from fedlora.runtime import flwr_run

        return flwr_run.answer(context, frame, echo)
    from fedlora.deploy.node import DeployedNode  # imports torch: only where there is work

    return DeployedNode(config).answer(frame, echo)


app = client_app(_greet, _answer)
