"""The command of the server: a run that is submitted, worked on and submitted again until it is finished."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from fedlora.cli.attached import log_to_stderr, read_secret, read_tls, require_address
from fedlora.cli.output import ConfigArgument, SetOption, only_ours
from fedlora.cli.serve_process import deliver_missing

if TYPE_CHECKING:
    from fedlora.config.schema import RunConfig

WORK = (sys.executable, "-m", "fedlora.cli.serve_process")
"""The process that works on the run."""

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
    require_address("--superlink", superlink, example="127.0.0.1:8000")
    secret, tls = read_secret(secret_file), read_tls(root_certificates)
    log_to_stderr()
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
        deliver_missing(run_dir)
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


def _checked(config: "RunConfig") -> Path:
    """The run's directory, which holds no other run; the config is one that can be served."""
    from fedlora.config.combinations import require_servable
    from fedlora.runs.rundir import require_server_dir

    require_servable(config)
    if len(config.tracking) > 1:  # what is imported for it takes a second
        from fedlora.tracking.telling import require_trackers

        require_trackers(config.tracking)
    run_dir = Path(config.output)
    require_server_dir(run_dir, config)
    return run_dir
