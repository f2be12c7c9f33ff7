"""The command of the server: a run that is submitted, worked on and submitted again until it is finished.

`python -m fedlora.cli.serve` is the process that works on it, which only the command itself starts.
"""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fedlora.cli.node import _log_to_stderr, _secret, _tls
from fedlora.cli.output import ConfigArgument, SetOption, only_ours
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.config.schema import RunConfig

WORK = (sys.executable, "-m", "fedlora.cli.serve")

_SuperLink: TypeAlias = Annotated[
    str, typer.Option("--superlink", metavar="HOST:PORT", help="The SuperLink's control and runtime APIs.")
]
_RootCertificates: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--root-certificates",
        metavar="FILE",
        help="CA of the SuperLink, PEM. Without it the two speak plain HTTP.",
    ),
]
_SecretFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--secret-file", metavar="FILE", help="The SuperLink's --superexec-auth-secret-file."),
]
_Nodes: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--nodes",
        metavar="FILE",
        help="nodes.json of fedlora provision: the keys that may join; read again when it changes.",
    ),
]
_App: TypeAlias = Annotated[
    Path, typer.Option("--app", metavar="DIR", help="Whose pyproject.toml names the Flower entry points.")
]
_MetricsPort: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="PORT",
        help="Figures for Prometheus at 127.0.0.1:PORT/metrics while it runs. Off by default.",
        min=0,
        max=65535,
    ),
]


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("serve", short_help="Run a federation on a SuperLink, until it is finished.")(serve)


def serve(
    path: ConfigArgument,
    superlink: _SuperLink,
    root_certificates: _RootCertificates = None,
    secret_file: _SecretFile = None,
    nodes: _Nodes = None,
    app: _App = Path(),
    metrics_port: _MetricsPort = None,
    overrides: SetOption = None,
) -> None:
    """Run a federation on a SuperLink that runs in --isolation process; stays until the run is finished.

    It takes the place of flower-superexec and of flwr run: it submits the run, works on it in a process of its own with
    fedlora as installed here, and submits it again, in the same series, when SuperLink or process die. It may be
    stopped, killed and started again at any moment; a run that is finished is left alone.
    """
    from fedlora.config.load import load_config
    from fedlora.config.located import located

    given = overrides or []
    config = load_config(path, given)
    with located(path, given):
        run_dir = _checked(config)
    _require_address(superlink)
    secret, tls = _secret(secret_file), _tls(root_certificates)
    _log()
    from fedlora.deploy.worker import Worker, alone, until_told  # light: a signal is heard from here on

    with only_ours(), until_told(), alone(run_dir), _metrics(run_dir, metrics_port):
        from fedlora.deploy.superlink import SuperLink, bundle
        from fedlora.deploy.supernode import require_known_flwr
        from fedlora.deploy.supervise import Supervisor

        require_known_flwr()
        Supervisor(
            run_dir,
            SuperLink(address=superlink, tls=tls, secret=secret),
            worker=Worker(run_dir, WORK),
            order=lambda token: {
                "config": str(path),
                "set": given,
                "superlink": superlink,
                "certificates": None if root_certificates is None else str(root_certificates),
                "token": token,
            },
            bundle=lambda name: bundle(app, name),
            nodes=nodes,
        ).run()
        _deliver(run_dir, config)
        logging.getLogger(__name__).info("finished: %s", run_dir)


@contextmanager
def _metrics(run_dir: Path, port: int | None) -> Iterator[None]:
    """This machine can read the run's figures within; nothing listens without a port."""
    if port is None:
        yield
        return
    from fedlora.monitor.metrics import metrics_served
    from fedlora.monitor.view import View

    with metrics_served(View(run_dir), "127.0.0.1", port) as bound:
        logging.getLogger(__name__).info("figures for Prometheus at http://127.0.0.1:%d/metrics", bound)
        yield


def work(order: dict[str, Any]) -> int:
    """The exit status of the process that works on a run: what the stock ServerApp does, with our own code only."""
    os.set_inheritable(order["held"], False)
    # Flower's client sends SIGINT to end us; a parent in the background may have had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _log()
    from fedlora.cli.app import explain

    try:
        _work(order["config"], order["set"], order)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, status = explain(error)
        if status == 1:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            message = "the SuperLink has given this run up"
        logging.getLogger(__name__).error("%s", message)
        return status


def _work(path: str, overrides: Sequence[str], order: dict[str, Any]) -> None:
    from fedlora.config.load import load_config
    from fedlora.config.located import located
    from fedlora.deploy.server_task import server_task

    certificates = None if order["certificates"] is None else Path(order["certificates"]).read_bytes()
    with server_task(order["superlink"], certificates, order["token"]) as grid:
        from fedlora.deploy.server import (
            serve as serve_run,
        )  # imports torch: the SuperLink knows of us by now
        from fedlora.export.deliver import delivering

        config = load_config(path, overrides)
        with located(path, overrides):
            stored = delivering(Path(config.output), config, logging.getLogger("fedlora").info)
            _deliver(serve_run(grid, config, stored), config)


def _deliver(run_dir: Path, config: "RunConfig") -> None:
    """The adapter and the report are there, whichever process died before it had written them."""
    if (run_dir / "adapter").exists() and (run_dir / "report.html").exists():
        return
    from fedlora.export.deliver import deliver
    from fedlora.runs.rundir import run_rounds
    from fedlora.runs.summary import summary_so_far
    from fedlora.runs.trained import trained_adapters

    deliver(
        run_dir,
        config=config,
        summary=summary_so_far(run_dir),
        rounds=run_rounds(run_dir),
        trained=lambda: trained_adapters(run_dir),
        say=logging.getLogger("fedlora").info,
    )


def _checked(config: "RunConfig") -> Path:
    """The run's directory, which holds no other run; the config is one that can be served."""
    from fedlora.config.combinations import require_servable
    from fedlora.config.load import require_same
    from fedlora.runs.rundir import load_roster, run_config

    require_servable(config)
    if len(config.tracking) > 1:  # what is imported for it takes a second
        from fedlora.tracking.telling import require_trackers

        require_trackers(config.tracking)
    run_dir = Path(config.output)
    if (run_dir / "config.yaml").exists():
        if load_roster(run_dir) is None:
            raise ConfigError(f"output: {run_dir} holds a simulation; choose another output")
        require_same(run_config(run_dir), config, run_dir)
    return run_dir


def _log() -> None:
    _log_to_stderr()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Flower's database, which is nowhere near here


def _require_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(
            f"--superlink {address!r}: not HOST:PORT; write for example --superlink 127.0.0.1:8000"
        )


if __name__ == "__main__":
    raise SystemExit(work(json.loads(sys.stdin.readline() or "null") or sys.exit(1)))
