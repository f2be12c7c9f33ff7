"""The certificates of one federation: an authority of its own, and the server's.

P-384 with SHA-384 throughout. The extensions are all that RFC 5280 asks for: Python 3.13 checks them strictly.
"""

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import ConfigError

AUTHORITY_DAYS = 3650
"""An authority outlives many server certificates: replacing it means handing a file to every node."""
BACKDATED = timedelta(hours=1)
"""A node whose clock lags a little must not take a new certificate for one that is not valid yet."""

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z)({_LABEL}\.)*(?![0-9]+\Z){_LABEL}\Z")
"""A host name; compose services may have underscores. A last label of digits is a mistyped address."""

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-384 key from OS entropy."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as TLS servers read it: PKCS #8, PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def authority_certificate(
    key: ec.EllipticCurvePrivateKey, now: datetime, *, days: int = AUTHORITY_DAYS
) -> x509.Certificate:
    """A self-signed authority that may sign server certificates, and no further authority.

    Its name follows from the key: a second certificate on the same key vouches for whatever the first one did.
    """
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"fedlora authority {identifier.digest.hex()[:12]}")]
    )
    return (
        _builder(key.public_key(), name, name, now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def server_certificate(
    public_key: ec.EllipticCurvePublicKey,
    names: Sequence[str],
    *,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    days: int,
) -> x509.Certificate:
    """The authority's word that the key is the server's, under every one of `names`, for `days` from now.

    Raises:
        ConfigError: one of the names is neither a host name nor an IP address.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora server")])
    issuer_key = authority_key.public_key()
    return (
        _builder(public_key, subject, authority.subject, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .add_extension(x509.SubjectAlternativeName([subject_name(name) for name in names]), critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def subject_name(name: str) -> x509.GeneralName:
    """The host name or IP address as a certificate holds it.

    Raises:
        ConfigError: it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not _HOST.match(name.lower()):
        raise ConfigError(
            f"--server-name: {name!r} is neither a host name nor an IP address; write one as nodes will reach the"
            " server, without scheme, port or wildcard"
        )
    return x509.DNSName(name.lower())


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The host names and IP addresses that the certificate is for."""
    names = extension(certificate, x509.SubjectAlternativeName)
    if names is None:
        return ()
    return tuple(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress))


def day(moment: datetime) -> str:
    """The moment to the minute, as messages show it."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _builder(
    public_key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, now: datetime, days: int
) -> x509.CertificateBuilder:
    start = now.replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATED)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """An authority's key signs certificates and nothing else; a server's key signs handshakes and nothing else."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    """The extension of that kind; None if the certificate has none."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
