"""The ledger's bytes: JSON lines, each with its own digest and that of the line before.

Format 1. Line 0 is the header, each other line one debit. A line is canonical JSON (sorted keys, no spaces,
floats as Python's repr, so they read back exactly) and one newline. `digest` is the SHA-256 of the line's
other fields, `prev` the SHA-256 of the whole line before, without its newline. Damage and edits show; a
rollback of whole lines needs a second witness.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.errors import LedgerError
from fedlora.values import DpEvent

FORMAT = "fedlora-ledger"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Whose ledger this is. `noise` is the kind of its noise source: one ledger never mixes kinds."""

    client: str
    dataset_fingerprint: str
    noise: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One debit: a participation paid before its training began."""

    seq: int
    run: str
    round: int
    request_digest: str
    event: DpEvent
    max_grad_norm: float
    noise: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A verified ledger. head: digest of the last line, the next `prev`. size: bytes before its newline."""

    header: Header
    entries: tuple[Entry, ...]
    head: str
    size: int


def header_line(header: Header) -> bytes:
    """The first line of a ledger."""
    fields = {"format": FORMAT, "version": VERSION, "seq": 0, "client": header.client, "noise": header.noise}
    return _sealed({**fields, "dataset": header.dataset_fingerprint})


def entry_line(entry: Entry, head: str) -> bytes:
    """The line of one debit, chained to the line whose digest is `head`."""
    event = {
        "noise_multiplier": entry.event.noise_multiplier,
        "sample_rate": entry.event.sample_rate,
        "max_grad_norm": entry.max_grad_norm,
        "steps": entry.event.steps,
    }
    fields = {"seq": entry.seq, "run": entry.run, "round": entry.round, "request": entry.request_digest}
    return _sealed({**fields, "event": event, "noise": entry.noise, "prev": head})


def parse(text: bytes, path: str) -> Contents:
    """The contents of a ledger all of whose bytes are sound, but for a last line cut off by a crash.

    A last line without its newline was never acknowledged: it is left out unless it is whole, and then it
    counts.

    Raises:
        LedgerError: damaged, edited, reordered, empty, or of a newer version.
    """
    lines = text.split(b"\n")
    tail = lines.pop()
    if tail and _is_whole(tail):
        lines.append(tail)
    if not lines:
        raise LedgerError(f"{path}: no header line ({len(text)} bytes); {RESTORE}")
    header = _header(lines[0], path)
    head, entries = _digest(lines[0]), []
    for number, line in enumerate(lines[1:], start=2):
        entries.append(_entry(line, head, header, seq=number - 1, where=f"{path}:{number}"))
        head = _digest(line)
    size = len(b"\n".join(lines))
    return Contents(header=header, entries=tuple(entries), head=head, size=size)


RESTORE = (
    "what this data set has spent is no longer known, so nothing may be released from it; "
    "restore the file from a backup taken after its last round, or retire the data set"
)


def _header(line: bytes, path: str) -> Header:
    _refuse_newer(line, path)  # before the digest, which a newer format may compute in another way
    fields = _unsealed(line, f"{path}:1")
    named = {kind: fields.get(kind) for kind in ("client", "dataset", "noise")}
    if (fields.get("format"), fields.get("version")) != (FORMAT, VERSION) or None in named.values():
        raise LedgerError(f"{path}:1: not a {FORMAT} header of version {VERSION}; {RESTORE}")
    return Header(client=fields["client"], dataset_fingerprint=fields["dataset"], noise=fields["noise"])


def _refuse_newer(line: bytes, path: str) -> None:
    try:
        version = json.loads(line)["version"]
    except (ValueError, KeyError, TypeError):
        return  # no header at all, which the digest will tell
    if isinstance(version, int) and version > VERSION:
        raise LedgerError(
            f"{path}:1: version {version}, this fedlora reads {VERSION}; install the fedlora that wrote it"
        )


def _entry(line: bytes, head: str, header: Header, *, seq: int, where: str) -> Entry:
    fields = _unsealed(line, where)
    if fields.get("prev") != head or fields.get("seq") != seq:
        raise LedgerError(
            f"{where}: does not follow the line before (seq {fields.get('seq')}, expected {seq}); {RESTORE}"
        )
    try:
        entry = _entry_of(fields)
    except (KeyError, TypeError) as error:
        raise LedgerError(f"{where}: no debit ({error!r}); {RESTORE}") from error
    if entry.noise != header.noise or not is_sound(entry):
        raise LedgerError(
            f"{where}: {entry.event} with noise {entry.noise!r} is no debit of this ledger; {RESTORE}"
        )
    return entry


def _entry_of(fields: dict[str, Any]) -> Entry:
    spent = fields["event"]
    return Entry(
        seq=fields["seq"],
        run=fields["run"],
        round=fields["round"],
        request_digest=fields["request"],
        event=DpEvent(
            noise_multiplier=spent["noise_multiplier"], sample_rate=spent["sample_rate"], steps=spent["steps"]
        ),
        max_grad_norm=spent["max_grad_norm"],
        noise=fields["noise"],
    )


def is_sound(entry: Entry) -> bool:
    """Whether an entry is a debit that will read back as it was written: right types, numbers in range."""
    event = entry.event
    numbers = (event.noise_multiplier, event.sample_rate, entry.max_grad_norm)
    return (
        all(isinstance(number, float) and number > 0 and math.isfinite(number) for number in numbers)
        and event.sample_rate <= 1
        and type(event.steps) is type(entry.round) is int
        and event.steps > 0
        and isinstance(entry.run, str)
        and isinstance(entry.request_digest, str)
    )


def _sealed(fields: dict[str, Any]) -> bytes:
    return _canonical({**fields, "digest": _digest(_canonical(fields))}) + b"\n"


def _unsealed(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
        digest = fields.pop("digest")
        intact = digest == _digest(_canonical(fields)) and _canonical({**fields, "digest": digest}) == line
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(f"{where}: damaged ({type(error).__name__}); {RESTORE}") from error
    if not intact:
        raise LedgerError(f"{where}: edited or damaged, its digest does not match; {RESTORE}")
    return fields


def _is_whole(line: bytes) -> bool:
    try:
        _unsealed(line, "")
    except LedgerError:
        return False
    return True


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def events_of(entries: Sequence[Entry]) -> tuple[DpEvent, ...]:
    """What the entries spent, in order."""
    return tuple(entry.event for entry in entries)
