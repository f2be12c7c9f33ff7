"""What is wrong with a certificate, told apart before a connection fails.

A failed handshake looks the same for every cause in Flower and in gRPC; these findings name the cause and the mend.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

from fedlora.provision.certificates import day, extension, names_of

SOON = timedelta(days=30)
"""Time to renew without hurry."""
Code: TypeAlias = Literal[
    "unreadable", "expired", "not-yet-valid", "ends-soon", "wrong-name", "wrong-authority", "wrong-key"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a certificate, and what mends it."""

    code: Code
    text: str
    mend: str
    fatal: bool = True
    """False: it still works today."""


def inspect_certificate(
    path: Path,
    now: datetime,
    *,
    name: str | None = None,
    authority: Path | None = None,
    key: Path | None = None,
) -> tuple[Finding, ...]:
    """All that is wrong with the certificate in `path`; nothing, if a peer that checks it will be content.

    Args:
        path: PEM; intermediate certificates may follow the first one.
        now: with a time zone.
        name: by which the server is reached; None leaves it unchecked.
        authority: PEM of what the peer trusts, one or several; None leaves it unchecked.
        key: PEM of the private key that the certificate is used with; None leaves it unchecked.
    """
    try:
        pem = path.read_bytes()
    except OSError as error:
        return (_unreadable(path, error.strerror or "no file"),)
    return inspect_pem(pem, now, source=str(path), name=name, authority=authority, key=key)


def inspect_pem(
    pem: bytes,
    now: datetime,
    *,
    source: str,
    name: str | None = None,
    authority: Path | None = None,
    key: Path | None = None,
) -> tuple[Finding, ...]:
    """`inspect_certificate` for one that is not in a file, such as what `ssl.get_server_certificate` fetched."""
    try:
        chain = x509.load_pem_x509_certificates(pem)
    except ValueError:
        return (_unreadable(source, "no PEM certificate in it"),)
    found = _time(chain[0], source, now, "renew it in the operator's kit: fedlora provision DIR --renew")
    if name is not None and not _is_for(chain[0], name):
        mend = f"reach it by one of those, or: fedlora provision DIR --renew --server-name {name}"
        names = ", ".join(names_of(chain[0])) or "no name at all"
        found.append(Finding(code="wrong-name", text=f"{source} is for {names}, not for {name}", mend=mend))
    if authority is not None:
        found += _trust(chain, source, authority, now)
    if key is not None:
        found += _key(chain[0].public_key(), source, key)
    return tuple(found)


def _unreadable(source: Path | str, why: str) -> Finding:
    return Finding(
        code="unreadable",
        text=f"{source} cannot be read as what it should be ({why})",
        mend="copy the file from the operator's kit again, and let the user of this process read it",
    )


def _time(certificate: x509.Certificate, source: str, now: datetime, mend: str) -> list[Finding]:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"here it is {day(now)}"
    if now > end:
        text = f"{source} ended on {day(end)}; {clock}"
        return [
            Finding(code="expired", text=text, mend=f"{mend}; or set this machine's clock, if it is wrong")
        ]
    if now < start:
        text = f"{source} begins on {day(start)}; {clock}"
        wait = "set this machine's clock, which is the likely fault; or wait until then"
        return [Finding(code="not-yet-valid", text=text, mend=wait)]
    if now > end - SOON:
        return [
            Finding(code="ends-soon", text=f"{source} ends on {day(end)}; {clock}", mend=mend, fatal=False)
        ]
    return []


def _is_for(certificate: x509.Certificate, name: str) -> bool:
    """Whether a peer that reaches the server as `name` takes the certificate; a wildcard covers one label."""
    names = names_of(certificate)
    try:
        return str(ipaddress.ip_address(name)) in names
    except ValueError:
        given = name.lower().rstrip(".")
        wildcard = f"*.{given.partition('.')[2]}"
        return any(held.lower() in (given, wildcard) for held in names)


def _trust(chain: Sequence[x509.Certificate], source: str, authority: Path, now: datetime) -> list[Finding]:
    try:
        trusted = x509.load_pem_x509_certificates(authority.read_bytes())
    except OSError as error:
        return [_unreadable(authority, error.strerror or "no file")]
    except ValueError:
        return [_unreadable(authority, "no PEM certificate in it")]
    issuers = _issuers(chain, trusted)
    if not issuers:
        held = ", ".join(certificate.subject.rfc4514_string() for certificate in trusted)
        text = (
            f"{source} was issued by {chain[-1].issuer.rfc4514_string()}, which {authority} ({held}) is not"
        )
        mend = (
            "copy ca.crt from the kit that the server's certificate is from (equal names: another key signed)"
        )
        return [Finding(code="wrong-authority", text=text, mend=mend)]
    mend = "make a new ca.crt on the same key (move the old one away, run fedlora provision DIR --renew) for all nodes"
    return _time(max(issuers, key=lambda issuer: issuer.not_valid_after_utc), str(authority), now, mend)


def _issuers(
    chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate]
) -> list[x509.Certificate]:
    """Whichever of the trusted ones vouch for the first of the chain, over the others of it where needed."""
    current, between = chain[0], list(chain[1:])
    while True:
        if found := [certificate for certificate in trusted if _issued(current, certificate)]:
            return found
        step = next((certificate for certificate in between if _issued(current, certificate)), None)
        if step is None:
            return []
        between.remove(step)
        current = step


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    constraints = extension(issuer, x509.BasicConstraints)
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return constraints is not None and constraints.ca


def _key(public_key: CertificatePublicKeyTypes, source: str, key: Path) -> list[Finding]:
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        return [_unreadable(key, error.strerror or "no file")]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return [_unreadable(key, "no unencrypted PEM private key in it")]
    if private.public_key() == public_key:
        return []
    mend = "put back the key that lay beside it; or remove both and run fedlora provision DIR again for a new pair"
    return [Finding(code="wrong-key", text=f"{source} is not for the key in {key}", mend=mend)]
