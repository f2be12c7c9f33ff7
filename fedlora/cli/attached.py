"""What commands share that attach to a process of Flower's: its address, its secret, its certificates, and the log."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.errors import ConfigError

if TYPE_CHECKING:
    import ssl


def require_address(option: str, address: str, *, example: str) -> None:
    """Passes HOST:PORT, as the option was given it."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{option} {address!r}: not HOST:PORT; write for example {option} {example}")


def read_secret(path: Path | None) -> bytes | None:
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


def read_tls(path: Path | None) -> "ssl.SSLContext | None":
    """What trusts the CA of the file alone; None, plain HTTP, without one."""
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


def log_to_stderr() -> None:
    """What is done is told on stderr, without what other libraries say of every step."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request otherwise
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Flower's database, which is nowhere near here
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
