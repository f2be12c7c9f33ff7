"""Where a monitor is, and whom to trust there."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorAddress:
    """Where a monitor is, and whom to trust to say so. roots: PEM file; None: plain text, on loopback only."""

    host: str
    port: int
    roots: Path | None

    @property
    def target(self) -> str:
        """As gRPC wants it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return self.target


def monitor_address(text: str, roots: Path | None) -> MonitorAddress:
    """HOST:PORT, or [HOST]:PORT with an IPv6 address.

    Raises:
        ConfigError: it is something else, or would be spoken to in plain text from outside.
    """
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "/" in host:
        host = ""
    # isdecimal alone would take other scripts' digits.
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise ConfigError(f"--server: {text!r} is no HOST:PORT; write for example server.example.org:9095")
    if roots is None and not is_loopback(host):
        raise ConfigError(
            f"--root-certificates: missing, and {host} is not this machine, so it is spoken to in TLS only; "
            f"give ca.crt of the operator's kit, or a file of public authorities"
        )
    return MonitorAddress(host=host, port=int(port), roots=roots)


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine can hear what is said to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
