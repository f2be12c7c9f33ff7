"""What a run amounts to: summary.json, from what lies in its directory."""

import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.schema import RunConfig
from fedlora.data.partition import client_names
from fedlora.disk import write_durably
from fedlora.errors import IncompleteError
from fedlora.federation.store import state_digest
from fedlora.kernels.table import chosen
from fedlora.runs.evidence import accounts, require_debits, unaccounted
from fedlora.runs.promise import promise
from fedlora.runs.rundir import (
    began_from,
    finished_summary,
    going_on,
    is_at_work,
    load_roster,
    newest_round,
    run_config,
    run_rounds,
)
from fedlora.values import ServerState

VERSIONED = ("fedlora", "torch", "transformers", "peft", "opacus", "dp-accounting", "flwr", "ray")


def summary_so_far(run_dir: Path) -> dict[str, Any]:
    """summary.json of a finished run; of another, the same keys as far as its files can tell, else None.

    Only reads: another process may be at work on the run.

    Raises:
        ConfigError: the directory holds no run.
        IncompleteError: it stopped before anything was scored.
        LedgerError: an account is short, so that the summary would tell less than was spent.
    """
    found = finished_summary(run_dir) or _unfinished(run_dir)
    require_debits(run_config(run_dir), run_dir)  # also of a finished run: its ledgers are its evidence
    return found


def run_status(run_dir: Path) -> dict[str, Any]:
    """The run's summary so far, and how far that is. Where an account is short, what was spent is None: unknown.

    Raises:
        ConfigError, IncompleteError: as `summary_so_far` does.
    """
    lines = run_rounds(run_dir)
    finished = finished_summary(run_dir)
    summary = _unfinished(run_dir) if finished is None else finished
    if summary["private"] and (lost := unaccounted(run_dir, accounts(run_dir))):
        known = {client: None if client in lost else e for client, e in summary["epsilon_by_client"].items()}
        summary = {**summary, "epsilon_max": None, "epsilon_by_client": known}
    return {
        "finished": finished is not None,
        "rounds": run_config(run_dir).federation.rounds,
        **summary,
        "refusals": sum(len(line["refused"]) for line in lines),
        "rejections": sum(len(line["rejected"]) for line in lines),
        "newest": newest_round(run_dir, lines),
    }


def _unfinished(run_dir: Path) -> dict[str, Any]:
    config = run_config(run_dir)
    if not run_rounds(run_dir):
        mend = "it is being prepared: wait" if is_at_work(run_dir) else going_on(run_dir)
        raise IncompleteError(f"{run_dir} has no model yet; {mend}")
    return run_summary(run_dir, config, clients=known_clients(run_dir, config))


def run_summary(
    run_dir: Path,
    config: RunConfig,
    *,
    clients: Sequence[str],
    state: ServerState | None = None,
    bytes_up: int | None = None,
    bytes_down: int | None = None,
    together: int = 1,
) -> dict[str, Any]:
    """Every key of summary.json, from what lies in the directory; nothing is taken from memory of how it went.

    Args:
        run_dir: of a simulation or of a server; at least the zero-step model is scored.
        config: of the run.
        clients: all who take part, asked or not.
        state: the last one, once it is reached.
        bytes_up: of one update as it travels, if known.
        bytes_down: of one request, if known.
        together: how many clients shared a forward pass.

    Raises:
        LedgerError: the run is finished and an account is short; or a ledger is damaged.
        PrivacyError: the run is finished and two accountants disagree about a ledger.
    """
    known = None if state is None else require_debits(config, run_dir)
    lines = run_rounds(run_dir)
    scored = [line for line in lines if line.get("score") is not None]
    answered = Counter(client for line in lines for client in line["answered"])
    participations = {client: answered[client] for client in sorted(clients)}
    seconds = sum(line["seconds"] for line in lines)
    return {
        "rounds_completed": lines[-1]["round"],
        "clients": len(participations),
        "participations": participations,
        "metric": scored[-1]["metric"] if scored else None,
        "score": scored[-1]["score"] if scored else None,
        "score_before": scored[0]["score"] if scored else None,
        **promise(config.privacy, run_dir, clients, finished=state is not None, known=known),
        "method": config.method.name,
        "beta": config.method.stale.beta,
        "began_from": began_from(run_dir),
        "public_records": getattr(config.data, "public", None),
        "seconds": round(seconds, 1),
        "client_rounds_per_second": round(sum(participations.values()) / seconds, 3) if seconds else None,
        "bytes_up_per_client_round": bytes_up,
        "bytes_down_per_client_round": bytes_down,
        "state_sha256": None if state is None else state_digest(state),
        "execution": execution(run_dir, config, together),
        "versions": versions(),
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """summary.json is whole and durable: the run is finished."""
    write_durably(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


def known_clients(run_dir: Path, config: RunConfig) -> list[str]:
    """All who take part in a run, as far as its files tell; only a partition by column keeps names to itself."""
    roster = load_roster(run_dir)
    if roster is not None:
        return [member.client for member in roster.members]
    count = config.data.partition.clients
    if count is not None:
        return client_names(count)
    return sorted({client for line in run_rounds(run_dir) for client in line["asked"]})


def execution(run_dir: Path, config: RunConfig, together: int = 1) -> str:
    """How clients ran, on machines like this one: who sums in another order agrees to float tolerance only."""
    if load_roster(run_dir) is not None:
        return "flower, one node for each data owner"
    who = f"{together} clients share a forward pass" if together > 1 else "one client after the other"
    kernels = chosen(config.model.kernels, config.runtime.device, config.model.dtype)
    return f"{config.runtime.kind}, {who} in each worker, kernels: {kernels}"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
