"""The start-up kit of a deployment: an authority, the server's certificate, node keys, and the executor's secret.

Running it again adds what is missing and keeps what is there; no key is ever overwritten. The kit is flat: one file,
one purpose, one recipient.
"""

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedlora.disk import try_lock
from fedlora.errors import ConfigError
from fedlora.provision.certificate_check import Finding, inspect_certificate
from fedlora.provision.certificates import AUTHORITY_DAYS, names_of, subject_name
from fedlora.provision.kit import (
    AUTHORITY,
    AUTHORITY_KEY,
    CERTIFICATE,
    KEY,
    Order,
    authority,
    load_certificate,
    server,
)
from fedlora.provision.node_keys import (
    PRIVATE,
    PUBLIC,
    RESERVED,
    complete_pair,
    nodes_to_register,
    public_line,
    register,
    replace,
    require_name,
)

DAYS = 365
"""Of a server certificate, unless told otherwise."""
SECRET, REGISTER, IGNORE = "superexec.secret", "nodes.json", ".gitignore"
_FIXED = (AUTHORITY_KEY, AUTHORITY, KEY, CERTIFICATE, SECRET, REGISTER, IGNORE)
_OURS = re.compile(r"server-[0-9a-f]{8}\.crt|[^.].*\.(key|pub)|\..+\.part")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What lies in the directory now."""

    directory: Path
    nodes: tuple[str, ...]
    server_names: tuple[str, ...]
    made: frozenset[str]
    """Names of the files that this run made, or made anew; all others were kept."""
    ends: dict[str, datetime]
    """File name -> end of validity, of every certificate."""
    findings: tuple[Finding, ...]
    """What is wrong with the server's certificate, or soon will be."""
    notes: tuple[str, ...]
    """What else somebody should do."""


def provision(
    directory: Path,
    *,
    nodes: int | None,
    now: datetime,
    server_names: Sequence[str] = (),
    days: int | None = None,
    renew: bool = False,
) -> Kit:
    """The directory holds a whole kit for `nodes` nodes.

    Args:
        directory: made if missing; holds nothing but a kit.
        nodes: how many in all; key pairs and lone public keys that lie there count. None: those that lie there.
        now: with a time zone.
        server_names: host names and IP addresses, beside those of the compose file's own services.
        days: until the server's certificate ends, if one is made; None: 365.
        renew: make a new server certificate, on the same key, for the same names and `server_names`.

    Raises:
        ConfigError: nothing useful can be made of the arguments or of what lies in the directory.
    """
    wanted = tuple(str(subject_name(name).value) for name in server_names)
    life = DAYS if days is None else days
    _require_sense(directory, nodes, life, renew)
    with _alone(directory):
        _require_ours(directory)
        order = Order(directory=directory, now=now, server_names=wanted, days=life, renew=renew)
        order.make(IGNORE, lambda: b"*\n", PUBLIC)  # first: no key may lie there for `git add` to find
        signer, signer_key = authority(order)
        certificate = server(order, signer, signer_key)
        # Flower takes the file's bytes as they are, so there is no line end; hexadecimal survives copy and paste.
        order.make(SECRET, lambda: secrets.token_hex(32).encode(), PRIVATE)
        names = _nodes(order, nodes)
        notes = [*_more_than(nodes, names), *_registered(order, names), *_open_keys(directory)]
        if days is not None and CERTIFICATE not in order.made:
            notes.append(f"{CERTIFICATE} was kept as it is; --renew makes one of {days} days")
        earlier = {path.name: load_certificate(path) for path in sorted(directory.glob("server-*.crt"))}
        held = {AUTHORITY: signer, CERTIFICATE: certificate, **earlier}
        return Kit(
            directory=directory,
            nodes=names,
            server_names=names_of(certificate),
            made=frozenset(order.made),
            ends={name: one.not_valid_after_utc for name, one in held.items()},
            findings=inspect_certificate(
                directory / CERTIFICATE, now, authority=directory / AUTHORITY, key=directory / KEY
            ),
            notes=tuple(notes),
        )


def provision_node(directory: Path, name: str) -> tuple[str, ...]:
    """NAME.key and NAME.pub lie in the directory, which may hold anything else; an empty one is kept out of git.

    Returns the names of the files made.

    Raises:
        ConfigError: the name is none, or files of that name lie there that are no such pair.
    """
    require_name(name)
    with _alone(directory):
        if (directory / f"{name}.pub").exists() and not (directory / f"{name}.key").exists():
            raise ConfigError(
                f"{directory / name}.pub lies there without {name}.key; bring the key back, or remove {name}.pub for a"
                " new pair (and register that one)"
            )
        if not any(directory.iterdir()):
            (directory / IGNORE).write_bytes(b"*\n")
        return complete_pair(directory, name)


def _require_sense(directory: Path, nodes: int | None, days: int, renew: bool) -> None:
    if nodes is None and not renew:
        raise ConfigError(
            "--nodes: missing; say how many nodes there are (--node NAME: one key pair, nothing else)"
        )
    if nodes is not None and nodes < 1:
        raise ConfigError(f"--nodes: {nodes}, but a federation has at least 1 node; give a larger number")
    if not 1 <= days <= AUTHORITY_DAYS:
        raise ConfigError(f"--days: {days}; give 1 to {AUTHORITY_DAYS}, the authority's own life")
    if renew and not (directory / CERTIFICATE).exists():
        raise ConfigError(
            f"--renew: {directory / CERTIFICATE} is not there, so there is nothing to renew; leave --renew away"
        )


def _require_ours(directory: Path) -> None:
    present = sorted(path.name for path in directory.iterdir())
    foreign = [name for name in present if name not in _FIXED and not _OURS.fullmatch(name)]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise ConfigError(
            f"{directory} holds what is no part of a kit ({shown}); name a new or empty directory, or move that away"
        )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """The directory exists, and no second run works on it meanwhile; trouble with its files is the user's to mend."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            if not try_lock(descriptor):
                raise ConfigError(
                    f"{directory} is being provisioned by another process; try again in a moment"
                )
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or directory}: {error.strerror}; name a directory that you can write to"
        ) from None


def _nodes(order: Order, total: int | None) -> tuple[str, ...]:
    """The names of all nodes, sorted; each has a public key, and those made here a private one."""
    directory = order.directory
    names = {path.stem for path in directory.iterdir() if path.suffix in (".key", ".pub")} - set(RESERVED)
    number = 0
    while len(names) < (total or 0):
        number += 1
        names.add(f"node-{number}")
    for name in sorted(names):
        order.made.extend(complete_pair(directory, require_name(name)))
    return tuple(sorted(names, key=_counted))


def _more_than(total: int | None, names: Sequence[str]) -> list[str]:
    """What has to be said where more nodes lie there than were asked for."""
    if total is None or len(names) <= total:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [
        f"--nodes {total}, but keys of {len(names)} nodes lie here ({shown}): all are kept and listed, none was made; "
        "for fewer, remove NAME.key and NAME.pub of who leaves, and give the command again"
    ]


def _counted(name: str) -> tuple[str | int, ...]:
    """Orders node-10 after node-9."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _registered(order: Order, names: Sequence[str]) -> list[str]:
    """nodes.json lists these nodes. Returns what has to be said of those that it listed before."""
    path = order.directory / REGISTER
    text = register({name: public_line(order.directory / f"{name}.pub") for name in names})
    if path.exists() and path.read_text() == text:
        return []
    gone = sorted(set(_listed(path)) - set(names))
    replace(path, text.encode(), PUBLIC)
    order.made.append(REGISTER)
    return [
        f"{name} is listed no more, but stays registered until: flwr supernode unregister" for name in gone
    ]


def _listed(path: Path) -> dict[str, bytes]:
    try:
        return nodes_to_register(path) if path.exists() else {}
    except ConfigError:
        return {}  # it is about to be written anew from the keys themselves


def _open_keys(directory: Path) -> list[str]:
    modes = {path: path.stat().st_mode & 0o777 for path in sorted(directory.iterdir())}
    return [
        f"{path} can be read by everybody on this machine (mode {mode:03o}): chmod 600 {path}"
        for path, mode in modes.items()
        if path.suffix in (".key", ".secret") and mode & 0o007
    ]
