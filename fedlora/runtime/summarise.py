"""The summary of a simulation: what its directory says, and the bytes that its messages take."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora.algebra.deltas import trainable, with_rest
from fedlora.algebra.flat import Layout
from fedlora.federation.store import Store
from fedlora.federation.work import work
from fedlora.runs.own_b import own_adapters, with_own_b
from fedlora.runs.summary import run_summary
from fedlora.runtime.prepare import Prepared
from fedlora.training.client import participation
from fedlora.training.tasks import evaluate
from fedlora.transport.wire import encode_reply, encode_request
from fedlora.values import ClientUpdate, ServerState, TrainRequest, Witness

MOST_PERSONAL = 64
"""Personal models that are scored; each is a pass over the test data."""


def summarise(prepared: Prepared, run_dir: Path, together: int, threads: int) -> dict[str, Any]:
    """summary.json of a finished simulation, in which `together` clients shared a forward pass.

    threads: to score personal models with, where there are any.
    """
    state, _ = Store(run_dir).load()
    down, up = frame_sizes(prepared, state)
    clients = [member.client for member in prepared.clients.members]
    told = run_summary(
        run_dir, prepared.config,
        clients=clients, state=state, bytes_up=up, bytes_down=down,
        together=together,
    )  # fmt: skip
    return {**told, **_personal_scores(prepared, run_dir, threads)} if prepared.method.own_b else told


def _personal_scores(prepared: Prepared, run_dir: Path, threads: int) -> dict[str, Any]:
    """How the model does on the public test data with each client's own B, released values only; and the mean.

    Of many clients some, evenly chosen by their names.
    """
    clients = with_own_b(run_dir)
    scores: dict[str, float] = {}
    torch.set_num_threads(threads)
    for client in clients[:: -(-len(clients) // MOST_PERSONAL) or 1]:
        prepared.model.load(own_adapters(run_dir, client))
        scores[client] = evaluate(prepared.model, prepared.clients.test).value
    torch.set_num_threads(prepared.config.runtime.threads)
    return {"personal": scores, "personal_mean": sum(scores.values()) / len(scores) if scores else None}


def frame_sizes(prepared: Prepared, state: ServerState) -> tuple[int, int]:
    """Bytes of one request and of one update as they travel, the largest of a run."""
    adapters, origin, config = state.adapters, prepared.origin, prepared.config
    if prepared.method.leaves_rest:
        adapters = with_rest(adapters)
    largest = max(prepared.method.sides, key=lambda side: Layout.of(trainable(adapters, side)).numbers)
    asked = replace(work(1, config.federation, prepared.method), side=largest)
    request = TrainRequest(
        run=origin.run,
        base_model=origin.base_model,
        code=origin.code,
        round=state.round,
        adapters=adapters,
        work=asked,
    )
    delta = trainable(adapters, asked.side)
    member = prepared.clients.members[0]
    terms = prepared.clients.terms[member.examples]
    evaluation_noise = None if config.privacy == "none" else config.privacy.evaluation_noise
    spent = participation(terms.mechanism, terms.sampling, evaluation_noise, asked.steps)
    update = ClientUpdate(
        client=member.client, run=origin.run, round=state.round, delta=delta, spent=spent,
        ledger=Witness(seq=1, head="0" * 64) if spent else None,
    )  # fmt: skip
    return len(encode_request(request)), len(encode_reply(update))
