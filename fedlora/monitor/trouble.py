"""Why a monitor cannot be reached. gRPC says UNAVAILABLE whatever the cause, so the connection is tried by hand."""

import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

from fedlora.errors import ConfigError, FedLoraError, IncompleteError
from fedlora.monitor.address import MonitorAddress
from fedlora.provision.certificate_check import inspect_pem

TIMEOUT_S = 5.0
_KIT = "ca.crt of the operator's kit"


def trouble(server: MonitorAddress) -> FedLoraError | None:
    """What is wrong between here and the server, with the next move; None: nothing that shows at this level.

    A certificate that is not trusted is a ConfigError: asking again does not mend it. The rest may pass.
    """
    try:
        with socket.create_connection((server.host, server.port), timeout=TIMEOUT_S):
            pass
    except socket.gaierror:
        return IncompleteError(
            f"{server}: no machine of the name {server.host!r} is known here; mend the name"
        )
    except ConnectionRefusedError:
        return IncompleteError(
            f"{server}: nothing listens there; start `fedlora monitor` beside the server, or give its port"
        )
    except TimeoutError:
        return IncompleteError(
            f"{server}: no answer within {TIMEOUT_S:.0f} s; look at firewalls on the way and whether the host is up"
        )
    except OSError as error:
        return IncompleteError(
            f"{server}: cannot be reached ({error.strerror}); look at the network on the way"
        )
    return _untrusted(server, server.roots) if server.roots is not None else _not_plain(server)


def _untrusted(server: MonitorAddress, roots: Path) -> FedLoraError | None:
    try:
        context = ssl.create_default_context(cafile=str(roots))
        protocol = _handshake(server, context)
    except ssl.SSLCertVerificationError as error:
        return ConfigError(_distrust(server, roots, error.verify_message))
    except (ssl.SSLError, OSError):
        # Whatever is not TLS answers a greeting with other bytes, an end, or nothing.
        return ConfigError(
            f"{server} does not speak TLS; start `fedlora monitor` there with --certificate and --key, or, for "
            "one on this machine, leave --root-certificates away"
        )
    return None if protocol == "h2" else _no_monitor(server)


def _distrust(server: MonitorAddress, roots: Path, message: str) -> str:
    """What OpenSSL does not like about the certificate, as our own check of the same certificate words it."""
    try:
        pem = ssl.get_server_certificate((server.host, server.port), timeout=TIMEOUT_S).encode()
    except OSError:
        pem = b""
    found = inspect_pem(
        pem, datetime.now(UTC), source=f"the certificate of {server}", name=server.host, authority=roots
    )
    fatal = [f"{finding.text}; {finding.mend}" for finding in found if finding.fatal and pem]
    return "\n".join(fatal) or f"the certificate of {server} is not trusted ({message}); is {roots} {_KIT}?"


def _not_plain(server: MonitorAddress) -> FedLoraError | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is said, only heard
    try:
        _handshake(server, context)
    except OSError:
        return None
    return ConfigError(f"{server} speaks TLS; give --root-certificates FILE, {_KIT}")


def _no_monitor(server: MonitorAddress) -> FedLoraError:
    return ConfigError(f"{server} speaks TLS but no gRPC; give the port of `fedlora monitor` there")


def _handshake(server: MonitorAddress, context: ssl.SSLContext) -> str | None:
    """The protocol that was agreed on."""
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((server.host, server.port), timeout=TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=server.host) as secured,
    ):
        return secured.selected_alpn_protocol()
