"""Watching a run from afar: the `monitor` command beside a server, and `status --server`, which asks it."""

import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fedlora.cli.output import Format, RunDirArgument, first_rows, only_ours, pairs, show
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.monitor.address import MonitorAddress

ServerOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--server", metavar="HOST:PORT", help="Ask the `fedlora monitor` there, instead of RUN_DIR."
    ),
]
FollowOption: TypeAlias = Annotated[
    bool, typer.Option("--follow", help="With --server: a line for each round until the run is finished.")
]
RootsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--root-certificates", metavar="FILE", help="With --server: PEM of whom to trust (ca.crt)."),
]


def add_to(app: typer.Typer) -> None:
    """The app knows these commands."""
    app.command("monitor", short_help="Serve a run's figures to whoever may look.")(monitor)


def monitor(
    run_dir: RunDirArgument,
    port: Annotated[
        int, typer.Option("--port", help="Of the gRPC service; 0: a free one.", min=0, max=65535)
    ],
    host: Annotated[
        str, typer.Option("--host", help="To listen at; others than loopback need a certificate.")
    ] = "127.0.0.1",
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Also /metrics, for Prometheus.", min=0, max=65535)
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="FILE", help="PEM; then both ports speak TLS.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="PEM of the certificate's private key.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Start though the run has not begun yet.")] = False,
) -> None:
    """Serve a run's figures to whoever may look, until it is told to stop. It only reads RUN_DIR."""
    from fedlora.interrupts import sigterm_as_ctrl_c
    from fedlora.monitor.service import monitored

    served = monitored(
        run_dir,
        host=host,
        port=port,
        metrics_port=metrics_port,
        certificate=certificate,
        key=key,
        wait=wait,
    )
    with suppress(KeyboardInterrupt), sigterm_as_ctrl_c(), only_ours(), served as bound:
        words = "TLS" if bound.tls else "plain text, this machine only"
        print(f"{run_dir}: status at {bound.host}:{bound.port} ({words})", file=sys.stderr, flush=True)
        if bound.metrics_port is not None:
            scheme = "https" if bound.tls else "http"
            where = f"{scheme}://{bound.host}:{bound.metrics_port}/metrics"
            print(f"figures for Prometheus at {where}", file=sys.stderr, flush=True)
        while True:  # short naps: a signal that came just before one, or to another thread, ends none
            time.sleep(0.2)


def status_of_server(server: str, roots: Path | None, form: Format, *, follow: bool = False) -> None:
    """Prints what `status RUN_DIR` would there; with `follow` after a line for each round, when the run is finished.

    Args:
        server: HOST:PORT of a monitor.
        roots: PEM file of whom to trust; None: plain text, on loopback only.
        form: of the one document on stdout.
        follow: lines go to stderr, as those of a simulation do.

    Raises:
        IncompleteError: the server cannot be reached, or can tell nothing yet.
        ConfigError: its certificate is not trusted, or it is no monitor.
    """
    from fedlora.monitor.address import monitor_address
    from fedlora.monitor.client import ask_status

    address = monitor_address(server, roots)
    with only_ours():
        if follow:
            _print_rounds(address)
        found = ask_status(address)
    text = status_text(server, found, "not finished; if nothing works on it, go on where the server is")
    show(found, text, form)


def require_one_source(run_dir: Path | None, server: str | None, *, follow: bool, roots: Path | None) -> None:
    """Passes a `status` that names either a directory or a server, and a server's options only with one.

    Raises:
        ConfigError: anything else.
    """
    if (run_dir is None) == (server is None):
        raise ConfigError(
            "status: of what? neither or both are named; give RUN_DIR or --server HOST:PORT, one of them"
        )
    if server is None and (follow or roots is not None):
        name = "--follow" if follow else "--root-certificates"
        raise ConfigError(
            f"{name} belongs to --server HOST:PORT; give that instead of RUN_DIR, or leave it away"
        )


def status_text(title: str, found: Mapping[str, Any], unfinished: str) -> str:
    """The table of `status`, the same for a directory and for a server.

    Args:
        title: stands above it.
        found: `monitor.view.found_in`, or a monitor's word.
        unfinished: what to say of a run that is not finished.
    """
    from fedlora.cli import budget
    from fedlora.export.statement import reservation
    from fedlora.export.words import bytes_text, duration, epsilon, number, score

    taken_back = reservation(found) if found["private"] else None
    promise = budget.known(epsilon, found["epsilon_max"]) if found["private"] else "NOT PRIVATE"
    promise += "" if taken_back is None else f" ({taken_back})"
    metric, pace = str(found["metric"]), number(found["client_rounds_per_second"])
    reasons = ", ".join(f"{count} {reason}" for reason, count in found["refusals_by_reason"].items())
    down, up = (bytes_text(found[f"bytes_{way}_per_client_round"]) for way in ("down", "up"))
    before, now = score(metric, found["score_before"]), score(metric, found["score"])
    rows = [
        ("state", "finished" if found["finished"] else unfinished),
        ("rounds", f"{found['rounds_completed']} of {found['rounds']}"),
        ("clients", str(found["clients"])),
        (f"test {metric}", f"{before} before, {now} when last scored"),
        ("epsilon", promise),
        (
            "refusals",
            f"{found['refusals']} refused{f' ({reasons})' if reasons else ''}, {found['rejections']} rejected",
        ),
        *_newest(found),
        ("pace", f"{pace} client rounds a second, {duration(found['seconds'])} in rounds so far"),
        *([] if down == up == "-" else [("bytes", f"{down} down and {up} up, a client and round")]),
    ]
    return f"{title}\n{pairs(rows)}\n\n{_clients(found)}"


def _newest(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who refused in the newest round, if anybody did, and whether the round failed by it."""
    from fedlora.federation.absences import by_reason

    newest = found.get("newest")  # a monitor of an earlier version has none
    if newest is None or not newest["refused"]:
        return []
    enough = "" if newest["round"] <= found["rounds_completed"] else ", too few"
    answered = f"{len(newest['answered'])} of {len(newest['asked'])} answered{enough}"
    return [(f"round {newest['round']}", f"{answered}; {by_reason(newest['refused'])}")]


def _clients(found: Mapping[str, Any]) -> str:
    """A line for each client, those that spent or did most first; of many, the first ones."""
    from fedlora.cli import budget
    from fedlora.export.words import epsilon

    spent, done = found["epsilon_by_client"], found["participations"]

    def first(client: str) -> tuple[float, int, str]:
        unknown_first = None if spent is None else spent.get(client, 0.0)
        return (math.inf if unknown_first is None else unknown_first) * -1, -done[client], client

    ordered = sorted(done, key=first)
    lines = [
        (
            client,
            str(done[client]),
            *([] if spent is None else [budget.known(epsilon, spent.get(client, 0.0))]),
        )
        for client in ordered
    ]
    heads = ("client", "rounds answered", *([] if spent is None else ["epsilon"]))
    return first_rows(heads, lines)


def _print_rounds(address: "MonitorAddress") -> None:
    """Every round so far and every one to come, as `simulate` shows its own; returns when the run is finished."""
    from fedlora.cli.progress import watching
    from fedlora.federation.events import RoundDone, RunStarted, Stage
    from fedlora.monitor.client import ask_status, follow

    with watching() as listener:
        listener(Stage(name=f"following {address}"))
        total, past, took = None, 0, 0.0
        for line in follow(address):
            if total is None:
                found = ask_status(address)
                total, past = found["rounds"], found["rounds_completed"]
                listener(
                    RunStarted(
                        clients=found["clients"],
                        rounds=total,
                        private=found["private"],
                        run_dir=Path(str(address)),
                    )
                )
            if line["round"] == 0:  # the model before any training: nobody was asked
                continue
            took += line["seconds"]
            left_s = took / line["round"] * (total - line["round"])
            # Of rounds long done, what was left then is no news.
            listener(RoundDone(round=line, eta_s=left_s if line["round"] >= past else None))
