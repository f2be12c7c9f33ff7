"""What `fedlora doctor` finds at a server's address, and in the kit that a deployment was given."""

import http.client
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from socket import create_connection, gaierror
from urllib.parse import urlsplit

from cryptography import x509
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fedlora.doctor.line import LIMIT_S, Line, fail, looked, ok, warn, within
from fedlora.errors import ConfigError
from fedlora.monitor.address import is_loopback
from fedlora.provision.certificate_check import Finding, inspect_certificate, inspect_pem
from fedlora.provision.certificates import day, names_of
from fedlora.provision.kit import AUTHORITY, AUTHORITY_KEY, CERTIFICATE, KEY, load_certificate
from fedlora.provision.node_keys import (
    RESERVED,
    fingerprint,
    nodes_to_register,
    public_line,
    read_private,
    read_public,
)
from fedlora.provision.provision import REGISTER, SECRET

CLOCK_S = 3.0
"""A difference worth mending."""
AHEAD_S, BEHIND_S = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
"""Flower refuses a node whose clock is further ahead of the server's than this, or further behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is, and whom to trust there; roots None: whom this machine trusts."""

    host: str
    port: int
    roots: Path | None = None


def address(text: str, roots: Path | None) -> Address:
    """HOST:PORT, or [HOST]:PORT with an IPv6 address; ConfigError if it is something else."""
    try:
        parts = urlsplit(f"//{text}")
        if parts.hostname and parts.port and parts.netloc == text and not re.search(r"[@\s]", text):
            return Address(host=parts.hostname, port=parts.port, roots=roots)
    except ValueError:
        pass
    raise ConfigError(f"--server: {text!r} is no HOST:PORT; write for example server.example.org:8443")


def server_lines(server: Address) -> Iterator[Line]:
    """Of a server that nodes reach; what cannot be reached is asked nothing more."""
    reached = list(looked("server", lambda: _reached(server)))
    yield from reached
    if any(line.state == "fail" for line in reached):
        return
    yield from looked("certificate", lambda: _certified(server))
    yield from looked("clock", lambda: _clock(server))


def _reached(server: Address) -> Iterator[Line]:
    place = f"{server.host}:{server.port}"
    try:
        within(lambda: create_connection((server.host, server.port), timeout=LIMIT_S).close(), LIMIT_S + 0.5)
    except gaierror:
        yield fail(
            "server", f"nobody here knows the name {server.host}", "mend the name, or the DNS of this machine"
        )
    except ConnectionRefusedError:
        yield fail("server", f"nothing listens at {place}", "start the server, or mend the port")
    except TimeoutError:
        yield fail(
            "server", f"{place} does not answer in {LIMIT_S:g} s", "open the port in the firewalls between"
        )
    except OSError as error:
        yield fail("server", f"{place}: {error.strerror or error}", "mend the network between")
    else:
        yield ok("server", f"{place} can be reached")


def _certified(server: Address) -> Iterator[Line]:
    """A verified handshake decides; `inspect_pem` says why it fails, and what it does not notice yet."""
    try:
        pem = within(lambda: _presented(server), LIMIT_S + 0.5)
    except TimeoutError:
        yield fail("certificate", f"no TLS handshake in {LIMIT_S:g} s", "name the port of the TLS proxy")
        return
    except (ssl.SSLError, OSError):
        local = is_loopback(server.host) and server.roots is None
        tell = warn if local else fail
        yield tell(
            "certificate", "it speaks no TLS", "name the TLS port; plain text is for this machine only"
        )
        return
    try:
        within(lambda: _handshake(server), LIMIT_S + 0.5)
        refused, trusted = "", None
    except ssl.SSLCertVerificationError as error:
        refused, trusted = error.verify_message, server.roots
    except OSError as error:
        words = getattr(error, "reason", None) or error.strerror or type(error).__name__
        yield fail("certificate", f"the TLS handshake fails: {words}", "compare TLS versions of both ends")
        return
    name = server.host
    found = inspect_pem(pem, datetime.now(UTC), source=f"what {name} shows", name=name, authority=trusted)
    yield from _found("certificate", found)
    if refused and not any(finding.fatal for finding in found):
        mend = "give the CA that signed it: --root-certificates ca.crt, from the operator's kit"
        yield fail("certificate", f"it is not trusted: {refused}", mend)
    elif not refused and not found:
        until = day(_first(pem).not_valid_after_utc)
        yield ok(
            "certificate", f"for {', '.join(names_of(_first(pem)))}, until {until}, of a trusted authority"
        )


def _first(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificates(pem)[0]


def _presented(server: Address) -> bytes:
    return ssl.get_server_certificate((server.host, server.port), timeout=LIMIT_S).encode()


def _context(server: Address) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if server.roots is None else str(server.roots))
    except OSError as error:  # what ssl raises, too
        words = "no certificates in it" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"--root-certificates {server.roots}: {words}; name a readable PEM file") from None


def _handshake(server: Address) -> None:
    context = _context(server)
    context.set_alpn_protocols(["h2", "http/1.1"])  # gRPC servers take nothing without
    with (
        create_connection((server.host, server.port), timeout=LIMIT_S) as plain,
        context.wrap_socket(plain, server_hostname=server.host),
    ):
        pass


def _clock(server: Address) -> Iterator[Line]:
    """The Date of any HTTP answer. The certificate does not matter here: nothing is believed but a difference."""
    try:
        told = within(lambda: _date(server), LIMIT_S + 0.5)
    except (OSError, http.client.HTTPException, ValueError):
        told = None
    if told is None:
        yield ok("clock", f"{server.host} tells no time, so the clocks were not compared")
        return
    here = datetime.now(UTC)
    ahead_s = (here - told).total_seconds()  # the Date has whole seconds, so it may be one too many
    found = f"here {here:%Y-%m-%d %H:%M:%S} UTC, there {told:%H:%M:%S}: {abs(ahead_s):,.0f} s apart"
    mend = "synchronise both machines by NTP (chrony or systemd-timesyncd)"
    if not -BEHIND_S <= ahead_s <= AHEAD_S + 1:
        yield fail(
            "clock", f"{found}; a node is refused if it is {AHEAD_S} s ahead or {BEHIND_S} s behind", mend
        )
    elif abs(ahead_s) > CLOCK_S:
        yield warn("clock", found, mend)
    else:
        yield ok("clock", f"{abs(ahead_s):.0f} s apart")


def _date(server: Address) -> datetime | None:
    for scheme in (_tls, _plain):
        connection = scheme(server)
        try:
            connection.request("HEAD", "/health")
            said = connection.getresponse().getheader("Date")
            return None if said is None else parsedate_to_datetime(said).astimezone(UTC)
        except ssl.SSLError:
            continue  # it speaks plain text
        finally:
            connection.close()
    return None


def _tls(server: Address) -> http.client.HTTPConnection:
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(server.host, server.port, timeout=LIMIT_S, context=anybody)


def _plain(server: Address) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.host, server.port, timeout=LIMIT_S)


def kit_lines(directory: Path, host: str | None = None) -> Iterator[Line]:
    """Of the directory that `fedlora provision` wrote, or of what a node was given of it; nothing is changed.

    Args:
        directory: the kit.
        host: a name that the server's certificate must be for; None: any.
    """
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    pairs = sorted({Path(name).stem for name in names if name.endswith((".key", ".pub"))} - set(RESERVED))
    if not pairs and CERTIFICATE not in names:
        yield fail("kit", f"{directory} holds no kit", "make one: fedlora provision DIR --nodes N")
        return
    if CERTIFICATE in names or KEY in names:
        yield from looked("kit certificate", lambda: _kit_certificate(directory, host))
        yield from looked("kit secret", lambda: _secret(directory / SECRET))
    elif AUTHORITY in names:
        found = inspect_certificate(directory / AUTHORITY, datetime.now(UTC))
        yield from _found("kit authority", found)
        if not found:
            yield ok(
                "kit authority", f"until {day(load_certificate(directory / AUTHORITY).not_valid_after_utc)}"
            )
    for name in pairs:
        yield from looked("kit key", lambda name=name: _pair(directory, name))
    if REGISTER in names:
        yield from looked("kit register", lambda: _register(directory, pairs))
    yield from looked("kit modes", lambda: _modes(directory))


def _kit_certificate(directory: Path, host: str | None) -> Iterator[Line]:
    path = directory / CERTIFICATE
    found = inspect_certificate(
        path, datetime.now(UTC), name=host, authority=directory / AUTHORITY, key=directory / KEY
    )
    yield from _found("kit certificate", found)
    if not found:
        held = load_certificate(path)
        names = ", ".join(names_of(held))
        yield ok("kit certificate", f"for {names}, until {day(held.not_valid_after_utc)}; its key fits")


def _found(name: str, found: tuple[Finding, ...]) -> Iterator[Line]:
    for finding in found:
        tell = fail if finding.fatal else warn
        yield tell(name, finding.text, finding.mend)


def _secret(path: Path) -> Iterator[Line]:
    if path.is_file() and path.stat().st_size:
        yield ok("kit secret", f"{path.name} is there")
    else:
        yield fail(
            "kit secret",
            f"{path} is missing or empty",
            "fedlora provision DIR --nodes N adds what is missing",
        )


def _pair(directory: Path, name: str) -> Iterator[Line]:
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    if not private.exists():
        yield ok("kit key", f"{name}: {fingerprint(public_line(public))}, its private key is elsewhere")
    elif not public.exists():
        read_private(private)
        mend = "fedlora provision DIR --node NAME makes it from the private key"
        yield warn("kit key", f"{name}: the private key alone", mend)
    elif read_private(private).public_key() != read_public(public):
        mend = f"remove {public.name} to have it made from the private key"
        yield fail("kit key", f"{public} is not the public key of {private}", mend)
    else:
        yield ok("kit key", f"{name}: {fingerprint(public_line(public))}")


def _register(directory: Path, pairs: list[str]) -> Iterator[Line]:
    listed = nodes_to_register(directory / REGISTER)
    if missing := sorted(set(pairs) - set(listed)):
        mend = "fedlora provision DIR --nodes N writes it anew"
        yield warn("kit register", f"{REGISTER} lacks {', '.join(missing)}", mend)
    else:
        yield ok("kit register", f"{REGISTER} lists {len(listed)} nodes")


def _modes(directory: Path) -> Iterator[Line]:
    """A group may read: the compose file's services do. Everybody may not."""
    private = [path for path in sorted(directory.iterdir()) if path.suffix in (".key", ".secret")]
    opened = [path for path in private if path.stat().st_mode & 0o007]
    for path in opened:
        found = f"{path} can be read by everybody on this machine (mode {path.stat().st_mode & 0o777:03o})"
        yield fail("kit modes", found, f"chmod 600 {path}; if others use this machine, make new keys")
    if (directory / AUTHORITY_KEY).exists():
        mend = "move it off the server; only --renew needs it"
        yield warn(
            "kit modes", f"{AUTHORITY_KEY} lies with the rest: whoever reads it can be the server", mend
        )
    elif not opened:
        yield ok("kit modes", f"{len(private)} private files, closed to everybody else")
