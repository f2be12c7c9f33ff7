"""The authority and the server's certificate as they lie in a kit's directory: made, kept, or renewed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.errors import ConfigError
from fedlora.provision.certificate_check import SOON, inspect_certificate
from fedlora.provision.certificates import (
    authority_certificate,
    certificate_pem,
    day,
    key_pem,
    names_of,
    new_key,
    server_certificate,
)
from fedlora.provision.node_keys import PRIVATE, PUBLIC, replace, write_new

SERVER_NAMES = ("localhost", "127.0.0.1", "superlink", "proxy")
"""By which the compose file's own services reach the server."""
AUTHORITY_KEY, AUTHORITY, KEY, CERTIFICATE = "ca.key", "ca.crt", "server.key", "server.crt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one run of `provision` is to do."""

    directory: Path
    now: datetime
    server_names: tuple[str, ...]
    """Beside SERVER_NAMES, or beside those of the certificate that is renewed."""
    days: int
    renew: bool
    made: list[str] = field(default_factory=list)
    """Grows by the name of every file that was made."""

    def make(self, name: str, content: Callable[[], bytes], mode: int) -> None:
        """The file is there; `content` is asked only if it was not."""
        if not (self.directory / name).exists():
            write_new(self.directory / name, content(), mode)
            self.made.append(name)


def authority(order: Order) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey | None]:
    """The authority, and its key unless that is kept elsewhere, as it may be while nothing is to be signed.

    A key without a certificate gets a new one, which vouches for everything the old one did.

    Raises:
        ConfigError: certificate and key do not fit, or both are missing beside a certificate of theirs.
    """
    key_path, path = order.directory / AUTHORITY_KEY, order.directory / AUTHORITY
    if not path.exists():
        if not key_path.exists() and (order.directory / CERTIFICATE).exists():
            raise ConfigError(
                f"{order.directory / CERTIFICATE} lies there, but neither {AUTHORITY} nor {AUTHORITY_KEY}; bring them"
                " back, or provision a new directory (node keys may be copied into it)"
            )
        order.make(AUTHORITY_KEY, lambda: key_pem(new_key()), PRIVATE)
        key = _load_key(key_path)
        order.make(AUTHORITY, lambda: certificate_pem(authority_certificate(key, order.now)), PUBLIC)
        return load_certificate(path), key
    certificate = load_certificate(path)
    key = _load_key(key_path) if key_path.exists() else None
    if key is not None and key.public_key() != certificate.public_key():
        raise ConfigError(f"{path} is not for the key in {key_path}; put back the two that belong together")
    return certificate, key


def server(
    order: Order, signer: x509.Certificate, signer_key: ec.EllipticCurvePrivateKey | None
) -> x509.Certificate:
    """The server's certificate, which is for every name asked for; an earlier one was kept aside.

    A renewal keeps the key, so that one file changes and there is no moment at which the two do not fit.

    Raises:
        ConfigError: the one that lies there does not fit, or none can be signed.
    """
    key_path, path = order.directory / KEY, order.directory / CERTIFICATE
    present = load_certificate(path) if path.exists() else None
    if present is not None and not key_path.exists():
        raise ConfigError(
            f"{path} lies there without {KEY}; bring the key back, or move {CERTIFICATE} away to have both made anew"
        )
    if present is not None and not order.renew:
        _require_fit(order, present)
        return present
    key_of_signer = _require_signer(order, signer, signer_key)
    order.make(KEY, lambda: key_pem(new_key()), PRIVATE)
    first = SERVER_NAMES if present is None else names_of(present)
    certificate = server_certificate(
        _load_key(key_path).public_key(),
        list(dict.fromkeys([*first, *order.server_names])),
        authority=signer,
        authority_key=key_of_signer,
        now=order.now,
        days=order.days,
    )
    if present is not None:
        aside = f"server-{present.serial_number & 0xFFFFFFFF:08x}.crt"
        replace(order.directory / aside, path.read_bytes(), PUBLIC)
        order.made.append(aside)
    replace(path, certificate_pem(certificate), PUBLIC)
    order.made.append(CERTIFICATE)
    return certificate


def load_certificate(path: Path) -> x509.Certificate:
    """The first certificate in the file.

    Raises:
        ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except ValueError:
        raise ConfigError(f"{path} holds no PEM certificate; bring back the one that was there") from None


def _require_fit(order: Order, present: x509.Certificate) -> None:
    """The certificate that is kept is valid now, of this authority, for this key and for every name asked for."""
    path = order.directory / CERTIFICATE
    found = inspect_certificate(
        path, order.now, authority=order.directory / AUTHORITY, key=order.directory / KEY
    )
    for finding in found:
        if finding.fatal:
            raise ConfigError(f"{finding.text}; {finding.mend}")
    missing = [name for name in order.server_names if name not in names_of(present)]
    if missing:
        raise ConfigError(
            f"{path} is not for {', '.join(missing)}; add --renew to have a new one with that name"
        )


def _require_signer(
    order: Order, signer: x509.Certificate, signer_key: ec.EllipticCurvePrivateKey | None
) -> ec.EllipticCurvePrivateKey:
    """The authority's key; the authority outlives what it is to sign."""
    if signer_key is None:
        raise ConfigError(
            f"{order.directory / AUTHORITY_KEY} is not there, and only that key can sign a server certificate; bring it"
            " back from where it is kept, or provision a new directory and hand its ca.crt to every node"
        )
    end = signer.not_valid_after_utc
    if order.now + timedelta(days=order.days) > end:
        left = (end - order.now).days
        shorter = f"give --days {left} or less, or " if left >= SOON.days else ""
        raise ConfigError(
            f"{order.directory / AUTHORITY} ends on {day(end)}, before the {order.days} days asked for; {shorter}move"
            f" {AUTHORITY} out of the directory and give the same command again: the new one is on the same key, and"
            f" every node must have it by {day(end)}"
        )
    return signer_key


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} holds no unencrypted EC key in PEM; bring back the one that was there")
    return key
