"""The ledger's bytes: JSON lines, each with its own digest and that of the line before.

Format 2. Line 0 is the header; each other line is a debit, written before a participation touches a record, or a
release, the digest of the bytes that came of a debit. A line is canonical JSON (sorted keys, no spaces, floats as
Python's repr, so they read back exactly) and one newline. `digest` is the SHA-256 of the line's other fields,
`prev` the SHA-256 of the whole line before, without its newline. Damage and edits show by themselves; that whole
lines are gone from the end shows to whoever saw them: the outbox, a mark, the server.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora.errors import LedgerError
from fedlora.values import DpEvent

FORMAT = "fedlora-ledger"
VERSION = 2
UNIT = "record"
ADJACENCY = "zero-out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Whose ledger this is. `noise` is the kind of its noise source: one ledger never mixes kinds."""

    client: str
    dataset_fingerprint: str
    noise: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Debit:
    """A participation, paid before its training began. attempt: 1, or more if earlier ones left no reply."""

    seq: int
    run: str
    round: int
    attempt: int
    request_digest: str
    events: tuple[DpEvent, ...]
    max_grad_norm: float
    noise: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """The bytes that came of a debit: their SHA-256, on disk before the first of them is sent."""

    seq: int
    debit: int
    payload: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A verified ledger. digests: of every line, by seq. size: bytes before the last newline."""

    header: Header
    debits: tuple[Debit, ...]
    releases: tuple[Release, ...]
    digests: tuple[str, ...]
    size: int

    @property
    def head(self) -> str:
        """Digest of the last line, the next `prev`."""
        return self.digests[-1]

    def released(self, debit: int) -> str | None:
        """The digest of the bytes that came of the debit with this seq."""
        return next((release.payload for release in self.releases if release.debit == debit), None)


def header_line(header: Header) -> bytes:
    """The first line of a ledger."""
    fields = {"format": FORMAT, "version": VERSION, "seq": 0, "unit": UNIT, "adjacency": ADJACENCY}
    whose = {"client": header.client, "dataset": header.dataset_fingerprint, "noise": header.noise}
    return _sealed({**fields, **whose})


def line(entry: Debit | Release, head: str) -> bytes:
    """The line of one debit or release, chained to the line whose digest is `head`."""
    if isinstance(entry, Release):
        words = {"kind": "release", "debit": entry.debit, "payload": entry.payload}
        return _sealed({"seq": entry.seq, **words, "prev": head})
    asked = {
        "run": entry.run,
        "round": entry.round,
        "attempt": entry.attempt,
        "request": entry.request_digest,
    }
    events = [asdict(event) for event in entry.events]
    paid = {"events": events, "max_grad_norm": entry.max_grad_norm, "noise": entry.noise}
    return _sealed({"seq": entry.seq, "kind": "debit", **asked, **paid, "prev": head})


def parse(text: bytes, path: str) -> Contents:
    """The contents of a ledger all of whose bytes are sound, but for a last line cut off by a crash.

    A last line without its newline was never acknowledged: it is left out unless it is whole, and then it
    counts.

    Raises:
        LedgerError: cut short, edited, swapped, deleted, doubled or of another ledger, each with its own words;
            empty, of another version, or a release that no debit or more than one pays for.
    """
    lines = text.split(b"\n")
    tail = lines.pop()
    if tail and _is_whole(tail):
        lines.append(tail)
    if not lines:
        raise LedgerError(f"{path}: no header line ({len(text)} bytes); {RESTORE}")
    header = _header(lines[0], path)
    debits: list[Debit] = []
    releases: list[Release] = []
    digests = [_digest(lines[0])]
    for seq, each in enumerate(lines[1:], start=1):
        where = f"{path}:{seq + 1}"
        fields = _unsealed(each, where)
        _require_next(fields, lines, digests, where)
        entry = _entry(fields, header, where)
        if isinstance(entry, Debit):
            debits.append(entry)
        else:
            _require_of_a_debit(entry, debits, releases, where)
            releases.append(entry)
        digests.append(_digest(each))
    return Contents(
        header=header,
        debits=tuple(debits),
        releases=tuple(releases),
        digests=tuple(digests),
        size=len(b"\n".join(lines)),
    )


RESTORE = (
    "what this data set has spent is no longer known, so nothing may be released from it; "
    "restore the file from a backup taken after its last round, or retire the data set"
)


def _header(text: bytes, path: str) -> Header:
    _refuse_other_versions(text, path)  # before the digest, which another format may compute in another way
    fields = _unsealed(text, f"{path}:1")
    named = {kind: fields.get(kind) for kind in ("client", "dataset", "noise")}
    terms = (fields.get("format"), fields.get("unit"), fields.get("adjacency"))
    if terms != (FORMAT, UNIT, ADJACENCY) or None in named.values():
        raise LedgerError(f"{path}:1: not a {FORMAT} header of version {VERSION}; {RESTORE}")
    return Header(client=fields["client"], dataset_fingerprint=fields["dataset"], noise=fields["noise"])


def _refuse_other_versions(text: bytes, path: str) -> None:
    try:
        version = json.loads(text)["version"]
    except (ValueError, KeyError, TypeError):
        return  # no header at all, which the digest will tell
    if isinstance(version, int) and version != VERSION:
        raise LedgerError(
            f"{path}:1: version {version}, this fedlora reads {VERSION}; use the fedlora that wrote it"
        )


def _require_next(fields: dict[str, Any], lines: Sequence[bytes], digests: Sequence[str], where: str) -> None:
    """Passes only the entry that follows those with these digests; says what has become of it otherwise."""
    expected, found, before = len(digests), fields.get("seq"), fields.get("prev")
    if found == expected and before == digests[-1]:
        return
    if found == expected:
        what = f"entry {found} belongs to another ledger: it follows {before}, here that is {digests[-1]}"
    elif before in digests[:-1]:
        what = f"entry {found} stands here a second time"
    elif any(line.endswith(f'"seq":{expected}}}'.encode()) for line in lines):
        what = f"lines were swapped, entry {found} stands before entry {expected}"
    else:
        what = f"lines were deleted, entry {found} stands where entry {expected} belongs"
    raise LedgerError(f"{where}: {what}; {RESTORE}")


def _entry(fields: dict[str, Any], header: Header, where: str) -> Debit | Release:
    try:
        entry = _debit_of(fields) if fields["kind"] == "debit" else _release_of(fields)
    except (KeyError, TypeError) as error:
        raise LedgerError(f"{where}: neither debit nor release ({error!r}); {RESTORE}") from error
    if isinstance(entry, Debit) and (entry.noise != header.noise or not is_sound(entry)):
        raise LedgerError(
            f"{where}: {entry.events} with noise {entry.noise!r} is no debit of this ledger; {RESTORE}"
        )
    return entry


def _debit_of(fields: dict[str, Any]) -> Debit:
    return Debit(
        seq=fields["seq"],
        run=fields["run"],
        round=fields["round"],
        attempt=fields["attempt"],
        request_digest=fields["request"],
        events=tuple(DpEvent(**event) for event in fields["events"]),
        max_grad_norm=fields["max_grad_norm"],
        noise=fields["noise"],
    )


def _release_of(fields: dict[str, Any]) -> Release:
    if fields["kind"] != "release":
        raise KeyError(fields["kind"])
    return Release(seq=fields["seq"], debit=fields["debit"], payload=fields["payload"])


def _require_of_a_debit(
    release: Release, debits: Sequence[Debit], earlier: Sequence[Release], where: str
) -> None:
    if release.debit not in {debit.seq for debit in debits}:
        raise LedgerError(f"{where}: releases debit {release.debit}, which is not there; {RESTORE}")
    if release.debit in {other.debit for other in earlier}:
        raise LedgerError(f"{where}: releases debit {release.debit} a second time; {RESTORE}")


def is_sound(debit: Debit) -> bool:
    """Whether a debit will read back as it was written: right types, numbers in range."""
    return (
        bool(debit.events)
        and all(_is_sound_event(event) for event in debit.events)
        and _is_positive(debit.max_grad_norm)
        and type(debit.round) is type(debit.attempt) is int
        and debit.attempt >= 1
        and isinstance(debit.run, str)
        and isinstance(debit.request_digest, str)
    )


def _is_sound_event(event: DpEvent) -> bool:
    cut = (event.expected_batch, event.max_draw)
    return (
        _is_positive(event.noise_multiplier)
        and _is_positive(event.sample_rate)
        and event.sample_rate <= 1
        and type(event.steps) is int
        and event.steps > 0
        and (cut == (None, None) or (_is_positive(cut[0]) and type(cut[1]) is int and cut[1] > 0))
    )


def _is_positive(number: object) -> bool:
    return isinstance(number, float) and number > 0 and math.isfinite(number)


def _sealed(fields: dict[str, Any]) -> bytes:
    return _canonical({**fields, "digest": _digest(_canonical(fields))}) + b"\n"


def _unsealed(text: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
        digest = fields.pop("digest")
        intact = digest == _digest(_canonical(fields)) and _canonical({**fields, "digest": digest}) == text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(f"{where}: cut short or overwritten ({type(error).__name__}); {RESTORE}") from error
    if not intact:
        raise LedgerError(f"{where}: edited, its digest does not match; {RESTORE}")
    return fields


def _is_whole(text: bytes) -> bool:
    try:
        _unsealed(text, "")
    except LedgerError:
        return False
    return True


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def events_of(debits: Sequence[Debit]) -> tuple[DpEvent, ...]:
    """What the debits spent, in order."""
    return tuple(event for debit in debits for event in debit.events)
