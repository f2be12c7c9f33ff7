"""The key pair of a node, in the forms that Flower 1.41 reads: who a node is, is the key it signs with.

`flower-supernode --auth-supernode-private-key` reads an OpenSSH private key without a password,
`flwr supernode register` an OpenSSH public key, both on a NIST curve (RSA and Ed25519 are refused); the register call
beneath it carries the public key as PEM.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.config.node import CLIENT_NAME
from fedlora.disk import fsync
from fedlora.errors import ConfigError
from fedlora.provision.certificates import new_key

PRIVATE, PUBLIC = 0o600, 0o644
RESERVED = ("ca", "server")
"""Names whose key files are not a node's."""
_REGISTER = "fedlora-nodes"


def require_name(name: str) -> str:
    """The name, which can be a node's.

    Raises:
        ConfigError: it cannot.
    """
    if not re.match(CLIENT_NAME, name):
        raise ConfigError(f"node: {name!r} is no name; use 1 to 96 letters, digits and . _ ~ -")
    if name.lower() in RESERVED or name.startswith("."):
        raise ConfigError(f"node: {name!r} is taken by a file of the kit; use another name")
    return name


def write_new(path: Path, content: bytes, mode: int) -> None:
    """`path` holds `content` and is on the disk; nobody else could read it in between, and nothing was overwritten."""
    if path.exists():
        raise ConfigError(f"{path} exists and is never overwritten; move it away first")
    replace(path, content, mode)


def replace(path: Path, content: bytes, mode: int) -> None:
    """`path` holds `content`, whole, and is on the disk; whatever it held before is gone."""
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask is
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    aside.replace(path)
    fsync(path.parent)


def complete_pair(directory: Path, name: str) -> tuple[str, ...]:
    """NAME.key and NAME.pub lie in the directory and fit each other. Returns the names of the files that were made.

    A public key alone is completed by nothing: its private key is elsewhere, where it belongs.

    Raises:
        ConfigError: a file is no such key, or the two do not fit.
    """
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    if not private.exists():
        if public.exists():
            read_public(public)
            return ()
        key = new_key()
        write_new(private, _private_bytes(key), PRIVATE)
        write_new(public, _public_bytes(key.public_key(), name), PUBLIC)
        return (private.name, public.name)
    key = read_private(private)
    if not public.exists():
        write_new(public, _public_bytes(key.public_key(), name), PUBLIC)
        return (public.name,)
    if read_public(public) != key.public_key():
        raise ConfigError(
            f"{public} is not the public key of {private}; remove {public.name} to have it made from the private key"
        )
    return ()


def read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of a node.

    Raises:
        ConfigError: it is not one that a SuperNode can use.
    """
    try:
        key = serialization.load_ssh_private_key(_bytes_of(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no OpenSSH private key without a password ({type(error).__name__}); {_ANOTHER}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an EC key, and Flower takes no other; {_ANOTHER}")
    return key


def read_public(path: Path) -> ec.EllipticCurvePublicKey:
    """The public key of a node.

    Raises:
        ConfigError: it is not one that can be registered.
    """
    return _public_key(_bytes_of(path), str(path))


def public_line(path: Path) -> str:
    """The public key in one line, as OpenSSH writes it, without a comment."""
    return _public_bytes(read_public(path), "").decode().strip()


def fingerprint(line: str) -> str:
    """As `ssh-keygen -l` shows it: what two people can compare over the telephone."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def register(keys: Mapping[str, str]) -> str:
    """The text of nodes.json: each name with its public key and that key's fingerprint.

    Raises:
        ConfigError: two names have the same key, so one could speak for the other.
    """
    first: dict[str, str] = {}
    for name, line in keys.items():
        if (other := first.setdefault(line, name)) != name:
            raise ConfigError(
                f"{other}.pub and {name}.pub are the same key; have {name} make its own: {_ANOTHER}"
            )
    nodes = [
        {"name": name, "public_key": line, "fingerprint": fingerprint(line)}
        for name, line in sorted(keys.items())
    ]
    return json.dumps({"format": _REGISTER, "version": 1, "nodes": nodes}, indent=2) + "\n"


def nodes_to_register(path: Path) -> dict[str, bytes]:
    """Name -> public key as PEM, which is what SuperLink's RegisterNode takes, from a nodes.json.

    Raises:
        ConfigError: the file is not a list of nodes that `fedlora provision` wrote.
    """
    try:
        held = json.loads(_bytes_of(path))
        if (held["format"], held["version"]) != (_REGISTER, 1):
            raise ConfigError(
                f"{path}: format {held['format']!r}, version {held['version']!r}; this reads {_REGISTER} 1"
            )
        lines = {str(node["name"]): str(node["public_key"]) for node in held["nodes"]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is no list of nodes; write it again: fedlora provision DIR --nodes N"
        ) from None
    if not lines:
        raise ConfigError(f"{path} lists no node; write it again: fedlora provision DIR --nodes N")
    return {
        require_name(name): _public_key(line.encode(), f"{path}: {name}").public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for name, line in lines.items()
    }


_ANOTHER = "make one on the node: fedlora provision DIR --node NAME (or ssh-keygen -t ecdsa -b 384 -N '')"


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; fedlora provision DIR --nodes N writes it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); run as its owner") from None


def _public_key(line: bytes, source: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(line.strip())
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{source} is no OpenSSH public key; {_ANOTHER}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{source} is not an EC key, and Flower takes no other; {_ANOTHER}")
    return key


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def _public_bytes(key: ec.EllipticCurvePublicKey, comment: str) -> bytes:
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {comment}".rstrip().encode() + b"\n"
