"""The command of a data owner's node."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import SetOption, only_ours
from fedlora.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    import ssl

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
    _require_address(supernode)
    tls = _tls(root_certificates)
    if secret_file is not None and not secret_file.parent.is_dir():
        raise ConfigError(
            f"--secret-file {secret_file}: no such folder; name the file that the SuperNode gets"
        )
    _log_to_stderr()
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


def _require_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(
            f"--supernode {address!r}: not HOST:PORT; write for example --supernode 127.0.0.1:9094"
        )


def _awaited_secret(path: Path | None) -> bytes | None:
    """The secret, which a SuperNode may make up later than this process starts."""
    if path is not None and not path.exists():
        log.warning("waiting for --secret-file %s, which the SuperNode is to share", path)
        while not path.exists():
            time.sleep(0.2)
    return _secret(path)


def _secret(path: Path | None) -> bytes | None:
    """The file's bytes as they are: Flower keeps a line's end too."""
    if path is None:
        return None
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--secret-file {path}: {error.strerror}; name a readable file") from None
    if not secret:
        raise ConfigError(f"--secret-file {path}: empty; name the file that the SuperNode got")
    return secret


def _tls(path: Path | None) -> "ssl.SSLContext | None":
    if path is None:
        return None
    import ssl

    try:
        return ssl.create_default_context(cafile=str(path))
    except ssl.SSLError as error:
        words = error.reason or "no PEM"
        raise ConfigError(f"--root-certificates {path}: no certificates ({words}); name a PEM file") from None
    except OSError as error:
        raise ConfigError(f"--root-certificates {path}: {error.strerror}; name a readable file") from None


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request otherwise
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
