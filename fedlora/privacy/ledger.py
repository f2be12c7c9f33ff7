"""What one client has spent on one data set: append-only, on disk before anything is trained.

A crash may waste budget, it can never overspend it. Every debit reads the file again under an exclusive lock,
so two processes, a forked child or an old handle cannot both take the last participation.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import LedgerError, PrivacyError
from fedlora.privacy.budget import Budget, would_exceed
from fedlora.privacy.ledger_format import (
    Contents,
    Entry,
    Header,
    entry_line,
    events_of,
    header_line,
    is_sound,
    parse,
)
from fedlora.privacy.noise import SEEDED
from fedlora.values import DpEvent

__all__ = ["Budget", "Entry", "Header", "Ledger", "open_ledger", "read_ledger", "would_exceed"]


def open_ledger(path: Path, *, client: str, dataset_fingerprint: str, noise_kind: str) -> "Ledger":
    """The ledger of this client and data set, made if there is none; a line torn by a crash has been dropped.

    Args:
        path: its file; missing parent directories are made.
        client: whose records.
        dataset_fingerprint: of the records as trained on.
        noise_kind: `NoiseSource.kind` of the noise that its releases will carry.

    Raises:
        LedgerError: the file is damaged, edited, of a newer version, another client's, another data set's or
            noise's.
    """
    path = Path(path)
    header = Header(client=client, dataset_fingerprint=dataset_fingerprint, noise=noise_kind)
    with _as_ledger_error(path):
        if not path.exists():
            _create(path, header_line(header))
        with _locked(path) as descriptor:
            contents = _repaired(descriptor, path)
    _require_same(path, contents.header, header)
    return Ledger(path, contents)


def read_ledger(path: Path) -> Contents:
    """A ledger's verified contents, for reports; nothing is written. Raises LedgerError if damaged."""
    with _as_ledger_error(path):
        return parse(Path(path).read_bytes(), str(path))


class Ledger:
    """A handle on one client's ledger. Holds no file open, so it may be forked or sent to another process."""

    def __init__(self, path: Path, contents: Contents) -> None:
        self._path = path
        self._contents = contents

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self._path

    @property
    def header(self) -> Header:
        """Whose it is."""
        return self._contents.header

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All debits, oldest first, as of the last debit or opening by this handle."""
        return self._contents.entries

    @property
    def events(self) -> tuple[DpEvent, ...]:
        """What they spent; epsilon is computed from these and never stored."""
        return events_of(self.entries)

    def find(self, run: str, round: int) -> Entry | None:
        """The debit of this round, if it was made."""
        return _find(self._contents, run, round)

    def debit(
        self,
        run: str,
        round: int,
        request_digest: str,
        event: DpEvent,
        *,
        max_grad_norm: float,
        budget: Budget,
    ) -> Entry:
        """The participation is on disk, fsynced, and its records may be touched now.

        The same request again is not paid twice where noise is seeded, since it ends in the same bytes. With
        any other noise a second training would be a second release: answer from the stored reply instead.

        Args:
            run: name of the run.
            round: its round.
            request_digest: of the request that is answered.
            event: what the participation will spend.
            max_grad_norm: the bound that its noise is measured in.
            budget: checked again under the lock.

        Raises:
            LedgerError: the round was debited for another request, event or bound, or noise cannot be
                repeated;
                or the file cannot be trusted or written.
            PrivacyError: the budget would be exceeded.
        """
        with _as_ledger_error(self._path), _locked(self._path) as descriptor:
            contents = _repaired(descriptor, self._path)
            _require_same(self._path, contents.header, self.header)
            entry = Entry(
                seq=len(contents.entries) + 1,
                run=run,
                round=round,
                request_digest=request_digest,
                event=event,
                max_grad_norm=max_grad_norm,
                noise=contents.header.noise,
            )
            earlier = _find(contents, run, round)
            if earlier is not None:
                self._contents = contents
                return _same_again(self._path, earlier, entry)
            _require_within(self._path, contents, event, budget)
            _append(descriptor, self._path, contents, entry)
            self._contents = _repaired(descriptor, self._path)
        return entry


def _find(contents: Contents, run: str, round: int) -> Entry | None:
    return next((entry for entry in contents.entries if (entry.run, entry.round) == (run, round)), None)


def _same_again(path: Path, earlier: Entry, asked: Entry) -> Entry:
    where = f"{path}: round {earlier.round} of run {earlier.run!r} (entry {earlier.seq})"
    for name in ("request_digest", "event", "max_grad_norm"):
        if getattr(earlier, name) != getattr(asked, name):
            raise LedgerError(
                f"{where} was debited with {name} {getattr(earlier, name)}, "
                f"now asked with {getattr(asked, name)}; "
                "refuse the request: one round is answered once"
            )
    if earlier.noise != SEEDED:
        raise LedgerError(
            f"{where} is already paid, its noise ({earlier.noise}) cannot be repeated; send the stored "
            "reply, or refuse the round"
        )
    return earlier


def _require_within(path: Path, contents: Contents, event: DpEvent, budget: Budget) -> None:
    if would_exceed(events_of(contents.entries), event, budget):
        raise PrivacyError(
            f"{path}: {len(contents.entries)} participations are spent; {event} would pass {budget}; "
            "refuse the round, or agree on a new budget with the data owner"
        )


def _require_same(path: Path, found: Header, wanted: Header) -> None:
    for name in ("client", "dataset_fingerprint", "noise"):
        if getattr(found, name) != getattr(wanted, name):
            raise LedgerError(
                f"{path}:1: {name} is {getattr(found, name)!r}, opened for {getattr(wanted, name)!r}; "
                "give each client, data set and kind of noise its own ledger path"
            )


def _repaired(descriptor: int, path: Path) -> Contents:
    """The file's contents, its end repaired: a torn line is cut off, a whole one gets its lost newline."""
    text = _read_all(descriptor)
    contents = parse(text, str(path))
    if len(text) == contents.size + 1:
        return contents
    if len(text) > contents.size:
        os.ftruncate(descriptor, contents.size + 1)
    else:
        os.write(descriptor, b"\n")
    os.fsync(descriptor)
    return contents


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _append(descriptor: int, path: Path, contents: Contents, entry: Entry) -> None:
    if not is_sound(
        entry
    ):  # what cannot be read back must never be written: it would make the ledger useless
        raise LedgerError(
            f"{path}: {entry} is no debit; need floats in range, a whole round and at least one step"
        )
    line = entry_line(entry, contents.head)
    written = os.write(descriptor, line)
    if written != len(line):
        os.ftruncate(descriptor, contents.size + 1)
        raise LedgerError(
            f"{path}: only {written} of {len(line)} bytes could be written; free space on its disk"
        )
    os.fsync(descriptor)


def _create(path: Path, line: bytes) -> None:
    """A new file with its header, whole or not at all: written aside, synced, then linked under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(aside, path)
    except FileExistsError:
        pass  # another process made it first; the header check that follows tells whether it is ours
    finally:
        aside.unlink()
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _as_ledger_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(
            f"{path}: {error.strerror or error}; nothing may be released until it can be written"
        ) from error
