"""The command of a data owner's node."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.attached import log_to_stderr, read_secret, read_tls, require_address
from fedlora.cli.output import SetOption, only_ours
from fedlora.errors import ConfigError, PrivacyError

log = logging.getLogger(__name__)


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("node", short_help="Answer for a data owner, attached to a SuperNode.")(node)


def node(
    path: Annotated[Path, typer.Argument(metavar="NODE", help="The data owner's YAML file.")],
    supernode: Annotated[
        str, typer.Option("--supernode", metavar="HOST:PORT", help="The SuperNode's runtime API.")
    ],
    root_certificates: Annotated[
        Path | None,
        typer.Option(
            "--root-certificates",
            metavar="FILE",
            help="CA of the SuperNode's runtime API, PEM. Without it the two speak plain HTTP.",
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option("--secret-file", metavar="FILE", help="The SuperNode's --superexec-auth-secret-file."),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Answer for a data owner until SIGTERM, attached to a SuperNode that runs in --isolation process.

    It stays, with the model in memory, where flower-superexec would start a process for each message; and it runs
    fedlora as installed here, never the code that the server sends.
    """
    from fedlora.config.load import load_node

    config = load_node(path, overrides or [])
    require_address("--supernode", supernode, example="127.0.0.1:9094")
    tls = read_tls(root_certificates)
    if secret_file is not None and not secret_file.parent.is_dir():
        raise ConfigError(
            f"--secret-file {secret_file}: no such folder; name the file that the SuperNode gets"
        )
    log_to_stderr()
    with only_ours():
        from fedlora.deploy.executor import run_node
        from fedlora.deploy.supernode import SuperNode

        with _named(path):
            run_node(
                config, lambda: SuperNode(address=supernode, tls=tls, secret=_awaited_secret(secret_file))
            )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong with the node begins with the name of its file; what a SuperNode refuses does not."""
    from fedlora.deploy.endpoint import UnwantedError

    try:
        yield
    except UnwantedError:
        raise
    except (ConfigError, PrivacyError) as error:
        error.args = (f"{path}: {error}",)
        raise


def _awaited_secret(path: Path | None) -> bytes | None:
    """The secret, which a SuperNode may make up later than this process starts."""
    if path is not None and not path.exists():
        log.warning("waiting for --secret-file %s, which the SuperNode is to share", path)
        while not path.exists():
            time.sleep(0.2)
    return read_secret(path)
