"""What a run amounts to: summary.json, and the epsilons recomputed from events alone."""

import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.schema import Privacy, RunConfig
from fedlora.data.partition import client_names
from fedlora.errors import IncompleteError, LedgerError
from fedlora.federation.loop import work
from fedlora.federation.store import Store, state_digest, write_durably
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import Contents, events_of
from fedlora.privacy.noise import BY_THE_NODES, SEEDED
from fedlora.privacy.step import spent
from fedlora.runtime.journal import reported_events
from fedlora.runtime.prepare import Prepared
from fedlora.runtime.rundir import SPENT, finished_summary, going_on, load_roster, run_config, run_rounds
from fedlora.runtime.wire import encode_reply, encode_request
from fedlora.values import ClientUpdate, Delta, DpEvent, ServerState, TrainRequest

VERSIONED = ("fedlora", "torch", "transformers", "peft", "opacus", "dp-accounting", "flwr", "ray")


def summarise(prepared: Prepared, run_dir: Path) -> dict[str, Any]:
    """summary.json of a finished simulation."""
    require_debits(prepared.config, run_dir)
    state, _ = Store(run_dir).load()
    down, up = frame_sizes(prepared, state)
    clients = [member.client for member in prepared.clients.members]
    return run_summary(run_dir, prepared.config, clients=clients, state=state, bytes_up=up, bytes_down=down)


def summary_so_far(run_dir: Path) -> dict[str, Any]:
    """summary.json of a finished run; of another, the same keys as far as its files can tell, else None.

    Only reads: another process may be at work on the run.

    Raises:
        ConfigError: the directory holds no run.
        IncompleteError: it stopped before anything was scored.
    """
    config = run_config(run_dir)
    finished = finished_summary(run_dir)
    if finished is not None:
        return finished
    if not run_rounds(run_dir):
        raise IncompleteError(f"{run_dir} has no model yet; wait, or {going_on(run_dir)}")
    return run_summary(run_dir, config, clients=known_clients(run_dir, config))


def run_summary(
    run_dir: Path,
    config: RunConfig,
    *,
    clients: Sequence[str],
    state: ServerState | None = None,
    bytes_up: int | None = None,
    bytes_down: int | None = None,
) -> dict[str, Any]:
    """Every key of summary.json, from what lies in the directory; nothing is taken from memory of how it went.

    Args:
        run_dir: of a simulation or of a server; at least the zero-step model is scored.
        config: of the run.
        clients: all who take part, asked or not.
        state: the last one, once it is reached.
        bytes_up: of one update as it travels, if known.
        bytes_down: of one request, if known.
    """
    lines = run_rounds(run_dir)
    scored = [line for line in lines if line.get("score") is not None]
    participations = {client: sum(client in line["answered"] for line in lines) for client in sorted(clients)}
    seconds = sum(line["seconds"] for line in lines)
    events = {**dict.fromkeys(participations, ()), **spent_events(run_dir)}
    return {
        "rounds_completed": lines[-1]["round"],
        "clients": len(participations),
        "participations": participations,
        "metric": scored[-1]["metric"] if scored else None,
        "score": scored[-1]["score"] if scored else None,
        "score_before": scored[0]["score"] if scored else None,
        **privacy_summary(config.privacy, events),
        "noise_source": None if config.privacy == "none" else noise_source(run_dir),
        "method": config.method.name,
        "beta": config.method.stale.beta,
        "seconds": round(seconds, 1),
        "client_rounds_per_second": round(sum(participations.values()) / seconds, 3) if seconds else None,
        "bytes_up_per_client_round": bytes_up,
        "bytes_down_per_client_round": bytes_down,
        "state_sha256": None if state is None else state_digest(state),
        "execution": execution(run_dir, config),
        "versions": versions(),
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """summary.json is whole and durable: the run is finished."""
    write_durably(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


def privacy_summary(privacy: Privacy | str, events: Mapping[str, tuple[DpEvent, ...]]) -> dict[str, Any]:
    """What was spent: epsilon of each client at the target delta, recomputed from `events`."""
    if not isinstance(privacy, Privacy):
        keys = ("epsilon_max", "epsilon_by_client", "delta", "accountant")
        return {"private": False, **dict.fromkeys(keys)}
    by_client = {
        client: epsilon(held, privacy.target_delta, privacy.accountant) for client, held in events.items()
    }
    return {
        "private": True,
        "epsilon_max": max(by_client.values(), default=0.0),
        "epsilon_by_client": by_client,
        "delta": privacy.target_delta,
        "accountant": privacy.accountant,
    }


def spent_events(run_dir: Path) -> dict[str, tuple[DpEvent, ...]]:
    """Client -> all it spent: by the ledgers of a simulation, by the nodes' own word in a server's run."""
    roster = load_roster(run_dir)
    return ledger_events(run_dir) if roster is None else reported_events(run_dir / SPENT, roster.members)


def ledger_events(run_dir: Path) -> dict[str, tuple[DpEvent, ...]]:
    """Simulated client -> everything its ledger says it spent."""
    return {ledger.header.client: events_of(ledger.entries) for ledger in _ledgers(run_dir)}


def require_debits(config: RunConfig, run_dir: Path) -> None:
    """Passes only a simulation in which every update that counted was paid for in its client's ledger.

    Raises:
        LedgerError: a ledger is gone or shorter than the rounds that its client answered.
    """
    if config.privacy == "none":
        return
    held = ledger_events(run_dir)
    answers = Counter(client for line in run_rounds(run_dir) for client in line["answered"])
    for client, answered in sorted(answers.items()):
        if len(held.get(client, ())) < answered:
            raise LedgerError(
                f"{run_dir / 'ledgers'}: {client} answered {answered} rounds, its ledger has "
                f"{len(held.get(client, ()))} debits; restore it, since what was spent is no longer known"
            )


def noise_source(run_dir: Path) -> str:
    """The kind of noise that the ledgers of a simulation name; what a server knows of it."""
    if load_roster(run_dir) is not None:
        return BY_THE_NODES
    kinds = {ledger.header.noise for ledger in _ledgers(run_dir)}
    # No ledger yet, or several kinds: then the weakest, since seeded noise is all that a simulation draws.
    return kinds.pop() if len(kinds) == 1 else SEEDED


def known_clients(run_dir: Path, config: RunConfig) -> list[str]:
    """All who take part in a run, as far as its files tell; only a partition by column keeps names to itself."""
    roster = load_roster(run_dir)
    if roster is not None:
        return [member.client for member in roster.members]
    count = getattr(config.data.partition, "clients", None)
    if count is not None:
        return client_names(count)
    return sorted({client for line in run_rounds(run_dir) for client in line["asked"]})


def execution(run_dir: Path, config: RunConfig) -> str:
    """How clients ran: who sums in another order agrees to float tolerance only."""
    if load_roster(run_dir) is not None:
        return "flower, one node for each data owner"
    return f"{config.runtime.kind}, one client after the other in each worker"


def frame_sizes(prepared: Prepared, state: ServerState) -> tuple[int, int]:
    """Bytes of one request and of one update as they travel."""
    adapters = state.adapters
    asked = work(1, prepared.config.federation)
    request = TrainRequest(run=prepared.run, round=state.round, adapters=adapters, work=asked)
    delta = Delta(
        basis=adapters.basis, sites={site: f.b for site, f in adapters.sites.items()}, head=adapters.head
    )
    client = prepared.clients.members[0].client
    mechanism = prepared.clients.terms[client].mechanism
    event = mechanism and spent(mechanism, asked.steps)
    update = ClientUpdate(client=client, run=prepared.run, round=state.round, delta=delta, spent=event)
    return len(encode_request(request)), len(encode_reply(update))


def versions() -> dict[str, str]:
    """Of Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _ledgers(run_dir: Path) -> Iterable[Contents]:
    return (read_ledger(path) for path in sorted((run_dir / "ledgers").glob("*.jsonl")))
