"""What a run amounts to: summary.json, and the epsilons recomputed from the ledgers' events alone."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.config.schema import Privacy
from fedlora.federation.loop import work
from fedlora.federation.store import Store, state_digest, write_durably
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import events_of
from fedlora.runtime.prepare import Prepared
from fedlora.runtime.rundir import run_config, run_rounds
from fedlora.runtime.wire import encode_reply, encode_request
from fedlora.values import ClientUpdate, Delta, DpEvent, ServerState, TrainRequest

VERSIONED = ("fedlora", "torch", "transformers", "peft", "opacus", "dp-accounting", "flwr", "ray")


def summarise(prepared: Prepared, run_dir: Path) -> dict[str, Any]:
    """summary.json of a run, from what lies in its directory; nothing is taken from memory of how it went."""
    config = prepared.config
    state, _ = Store(run_dir).load()
    lines = run_rounds(run_dir)
    seconds = sum(line["seconds"] for line in lines)
    participations = {
        member.client: sum(member.client in line["answered"] for line in lines)
        for member in prepared.clients.members
    }
    down, up = frame_sizes(prepared, state)
    return {
        "rounds_completed": state.round,
        "clients": len(prepared.clients.members),
        "participations": participations,
        "metric": lines[-1]["metric"],
        "score": lines[-1]["score"],
        "score_before": lines[0]["score"],
        **privacy_summary(config.privacy, ledger_events(run_dir)),
        "noise_source": "seeded (simulation)" if config.privacy != "none" else None,
        "method": config.method.name,
        "beta": config.method.stale.beta,
        "seconds": round(seconds, 1),
        "client_rounds_per_second": round(sum(participations.values()) / seconds, 3) if seconds else None,
        "bytes_up_per_client_round": up,
        "bytes_down_per_client_round": down,
        "state_sha256": state_digest(state),
        "execution": f"{config.runtime.kind}, one client after the other in each worker",
        "versions": versions(),
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """summary.json is whole and durable: the run is finished."""
    write_durably(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


def privacy_summary(privacy: Privacy | str, events: Mapping[str, tuple[DpEvent, ...]]) -> dict[str, Any]:
    """What was spent: epsilon of each client at the target delta, recomputed from `events`."""
    if not isinstance(privacy, Privacy):
        return {
            "private": False,
            "epsilon_max": None,
            "epsilon_by_client": None,
            "delta": None,
            "accountant": None,
        }
    spent = {
        client: epsilon(held, privacy.target_delta, privacy.accountant) for client, held in events.items()
    }
    return {
        "private": True,
        "epsilon_max": max(spent.values(), default=0.0),
        "epsilon_by_client": spent,
        "delta": privacy.target_delta,
        "accountant": privacy.accountant,
    }


def ledger_events(run_dir: Path) -> dict[str, tuple[DpEvent, ...]]:
    """Client -> everything its ledger says it spent."""
    ledgers = [read_ledger(path) for path in sorted((run_dir / "ledgers").glob("*.jsonl"))]
    return {ledger.header.client: events_of(ledger.entries) for ledger in ledgers}


def run_budget(path: Path) -> list[dict[str, Any]]:
    """Spent and left of every ledger of a run directory; of a lone ledger, what was spent."""
    if path.is_file():
        ledger = read_ledger(path)
        return [{"client": ledger.header.client, "participations": len(ledger.entries)}]
    privacy = run_config(path).privacy
    if privacy == "none":
        return []
    rows = []
    for client, events in ledger_events(path).items():
        spent = epsilon(events, privacy.target_delta, privacy.accountant)
        rows.append(
            {
                "client": client,
                "participations": len(events),
                "max_participations": privacy.max_participations,
                "epsilon": spent,
                "target_epsilon": privacy.target_epsilon,
                "delta": privacy.target_delta,
                "left": max(0.0, privacy.target_epsilon - spent),
            }
        )
    return rows


def frame_sizes(prepared: Prepared, state: ServerState) -> tuple[int, int]:
    """Bytes of one request and of one update as they travel."""
    adapters = state.adapters
    asked = work(1, prepared.config.federation)
    request = TrainRequest(run=prepared.run, round=state.round, adapters=adapters, work=asked)
    delta = Delta(
        basis=adapters.basis, sites={site: f.b for site, f in adapters.sites.items()}, head=adapters.head
    )
    client = prepared.clients.members[0].client
    spent = prepared.clients.terms[client].mechanism and DpEvent(
        noise_multiplier=1.0, sample_rate=0.1, steps=asked.steps
    )
    update = ClientUpdate(client=client, run=prepared.run, round=state.round, delta=delta, spent=spent)
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
