"""What a run amounts to at this moment, finished or not, read from its files while it may still go on."""

from pathlib import Path
from typing import Any

from fedlora.errors import IncompleteError


def summary_so_far(run_dir: Path) -> dict[str, Any]:
    """summary.json of a finished run; of another, the same keys as far as its files can tell, else None.

    Only reads: another process may be at work on the run.

    Raises:
        ConfigError: the directory holds no run.
        IncompleteError: it stopped before anything was scored.
    """
    from fedlora.runtime.rundir import finished_summary, run_config, run_rounds
    from fedlora.runtime.summary import ledger_events, privacy_summary, versions

    config = run_config(run_dir)
    summary = finished_summary(run_dir)
    if summary is not None:
        return summary
    lines = run_rounds(run_dir)
    if not lines:
        raise IncompleteError(f"{run_dir} has no model yet; wait, or go on with: fedlora resume {run_dir}")
    return {
        "rounds_completed": lines[-1]["round"],
        **progress(lines),
        **privacy_summary(config.privacy, ledger_events(run_dir)),
        "noise_source": None if config.privacy == "none" else "seeded (simulation)",
        "method": config.method.name,
        "beta": config.method.stale.beta,
        "bytes_up_per_client_round": None,
        "bytes_down_per_client_round": None,
        "state_sha256": None,
        "execution": config.runtime.kind,
        "versions": versions(),
    }


def progress(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Clients, score and pace from the lines of rounds.jsonl; line 0 is the zero-step model."""
    scored = [line for line in lines if line.get("score") is not None]
    clients = sorted({client for line in lines for client in line["asked"]})
    participations = {client: sum(client in line["answered"] for line in lines) for client in clients}
    seconds = sum(line["seconds"] for line in lines)
    return {
        "clients": len(clients),
        "participations": participations,
        "metric": scored[-1]["metric"] if scored else None,
        "score": scored[-1]["score"] if scored else None,
        "score_before": scored[0]["score"] if scored else None,
        "seconds": round(seconds, 1),
        "client_rounds_per_second": round(sum(participations.values()) / seconds, 3) if seconds else None,
    }
