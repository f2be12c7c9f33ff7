"""The peer's ClientApp, in a module that Ray's workers import: only there does a process keep what it loaded.

AT_SCALE_HOW: kept (the model stays, `fedlora.training.client.train` with the client's ledger), step (the same private
step without ledger and reply), ghost or trimmed (the model loaded in every call, see `at_scale.ghost`).
"""

import os
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from at_scale.stock_work import Clients

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of one client."""
    number = int(context.node_config["partition-id"])
    start = message.content["arrays"]["trained"].numpy()
    round_ = int(message.content["config"]["server-round"])
    clients = _clients()
    match os.environ["AT_SCALE_HOW"]:
        case "kept":
            trained = clients.train(number, round_, start)
        case "step":
            trained = clients.step(number, round_, start)
        case how:
            trained = clients.ghost(number, start, trimmed=how == "trimmed")
    content = {
        "arrays": ArrayRecord({"trained": Array(trained.astype(np.float32, copy=False))}),
        "metrics": MetricRecord({"num-examples": clients.records(number)}),
    }
    return Message(RecordDict(content), reply_to=message)


@lru_cache(maxsize=1)
def _clients() -> "Clients":
    """All clients of the case, their records tokenised once in a process."""
    from at_scale.stock_work import Clients

    return Clients(os.environ["AT_SCALE_MATERIAL"], os.environ["AT_SCALE_SCRATCH"])
