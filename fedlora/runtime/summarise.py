"""The summary of a simulation: what its directory says, and the bytes that its messages take."""

from pathlib import Path
from typing import Any

from fedlora.algebra.deltas import trainable, with_rest
from fedlora.algebra.flat import Layout
from fedlora.federation.store import Store
from fedlora.federation.work import work
from fedlora.runs.summary import run_summary
from fedlora.runtime.prepare import Prepared
from fedlora.training.client import participation
from fedlora.transport.wire import encode_reply, encode_request
from fedlora.values import ClientUpdate, ServerState, TrainRequest, Witness


def summarise(prepared: Prepared, run_dir: Path, together: int) -> dict[str, Any]:
    """summary.json of a finished simulation, in which `together` clients shared a forward pass."""
    state, _ = Store(run_dir).load()
    down, up = frame_sizes(prepared, state)
    clients = [member.client for member in prepared.clients.members]
    return run_summary(
        run_dir, prepared.config,
        clients=clients, state=state, bytes_up=up, bytes_down=down,
        together=together,
    )  # fmt: skip


def frame_sizes(prepared: Prepared, state: ServerState) -> tuple[int, int]:
    """Bytes of one request and of one update as they travel, the largest of a run."""
    adapters, origin, config = state.adapters, prepared.origin, prepared.config
    if prepared.method.leaves_rest:
        adapters = with_rest(adapters)
    largest = max(prepared.method.sides, key=lambda side: Layout.of(trainable(adapters, side)).numbers)
    asked = work(1, config.federation, largest)
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
