"""What one client has spent on one data set: append-only, on disk before anything is trained.

A crash may waste budget, it can never overspend it. Every debit reads the file again under an exclusive lock,
so two processes, a forked child or an old handle cannot both take the last participation.
"""

import hashlib
import hmac
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import LedgerError, PrivacyError
from fedlora.privacy.budget import Budget, would_exceed
from fedlora.privacy.ledger_file import append, as_ledger_error, create, locked, repaired
from fedlora.privacy.ledger_format import (
    RESTORE,
    Contents,
    Debit,
    Header,
    Release,
    events_of,
    header_line,
    parse,
)
from fedlora.privacy.ledger_mark import marked, require_reached, set_mark
from fedlora.privacy.noise import SEEDED
from fedlora.values import DpEvent, Witness

MOST_ATTEMPTS = 3
"""Debits of one round: a crash that comes back with the same request must not eat the whole budget."""


def open_ledger(
    path: Path, *, client: str, dataset_fingerprint: str, noise_kind: str, mark: Path | None = None
) -> "Ledger":
    """The ledger of this client and data set, made if there is none; a line torn by a crash has been dropped.

    Args:
        path: its file; missing parent directories are made.
        client: whose records.
        dataset_fingerprint: of the records. The ledger of real noise holds it under a key that lies beside it, in
            a file of its name and `.key`: replies name the ledger's digests, which must say nothing of records.
        noise_kind: `NoiseSource.kind` of the noise that its releases will carry.
        mark: a file elsewhere that remembers how far the ledger has come, so that losing it is noticed.

    Raises:
        LedgerError: the file is damaged, edited, behind its mark, of another version, another client's, another
            data set's or noise's.
    """
    path = Path(path)
    with as_ledger_error(path):
        seen = marked(mark)  # before the ledger is read, since another process may bring both forward
        if not path.exists():
            require_reached(path, None, seen)
            keyed = _keyed(path, dataset_fingerprint, noise_kind)
            create(path, header_line(Header(client=client, dataset_fingerprint=keyed, noise=noise_kind)))
        with locked(path) as descriptor:
            contents = repaired(descriptor, path)
        _require_owner(path, contents.header, client, noise_kind)
        keyed = _keyed(path, dataset_fingerprint, noise_kind)
    _require_same(path, contents.header, Header(client=client, dataset_fingerprint=keyed, noise=noise_kind))
    require_reached(path, contents, seen)
    return Ledger(path, contents, mark)


def _keyed(path: Path, fingerprint: str, noise_kind: str) -> str:
    """The fingerprint under the ledger's key: it tells whoever lacks the key nothing about a record."""
    if noise_kind == SEEDED:
        return fingerprint
    beside = path.with_name(f"{path.name}.key")
    if not beside.exists():
        if path.exists():
            raise LedgerError(f"{beside}: missing, so nobody can tell whose records {path} is of; {RESTORE}")
        create(beside, os.urandom(32))
    return hmac.new(beside.read_bytes(), fingerprint.encode(), hashlib.sha256).hexdigest()


def read_ledger(path: Path) -> Contents:
    """A ledger's verified contents, for reports; nothing is written. Raises LedgerError if damaged."""
    with as_ledger_error(path):
        return parse(Path(path).read_bytes(), str(path))


class Ledger:
    """A handle on one client's ledger. Holds no file open, so it may be forked or sent to another process."""

    def __init__(self, path: Path, contents: Contents, mark: Path | None = None) -> None:
        self._path = path
        self._contents = contents
        self._mark = mark

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self._path

    @property
    def header(self) -> Header:
        """Whose it is."""
        return self._contents.header

    @property
    def debits(self) -> tuple[Debit, ...]:
        """All debits, oldest first, as of the last write or opening by this handle."""
        return self._contents.debits

    @property
    def events(self) -> tuple[DpEvent, ...]:
        """What they spent; epsilon is computed from these and never stored."""
        return events_of(self.debits)

    def find(self, run: str, round: int) -> Debit | None:
        """The latest debit of this round, if one was made."""
        return _find(self._contents, run, round)

    def released(self, debit: Debit) -> str | None:
        """The digest of the bytes that came of this debit, if they were recorded."""
        return self._contents.released(debit.seq)

    def witness(self, debit: Debit) -> Witness:
        """What to tell the server of this debit, so that it notices if the ledger is ever put back."""
        return Witness(seq=debit.seq, head=self._contents.digests[debit.seq])

    def debit(
        self,
        run: str,
        round: int,
        request_digest: str,
        events: tuple[DpEvent, ...],
        *,
        max_grad_norm: float,
        budget: Budget,
    ) -> Debit:
        """The participation is on disk, fsynced, and its records may be touched now.

        The same request again is not paid twice where noise is seeded, since it ends in the same bytes. With
        any other noise it is a new attempt, and paid: only who still has the reply of the last one need not ask.

        Args:
            run: name of the run.
            round: its round.
            request_digest: of the request that is answered.
            events: what the participation will spend.
            max_grad_norm: the bound that its noise is measured in.
            budget: checked again under the lock.

        Raises:
            LedgerError: the round was debited for another request, events or bound, or too often; or the file
                cannot be trusted or written.
            PrivacyError: the budget would be exceeded.
        """
        with self._writing() as descriptor:
            contents = self._contents
            earlier = _find(contents, run, round)
            debit = Debit(
                seq=len(contents.digests),
                run=run,
                round=round,
                attempt=1 if earlier is None else earlier.attempt + 1,
                request_digest=request_digest,
                events=events,
                max_grad_norm=max_grad_norm,
                noise=contents.header.noise,
            )
            if earlier is not None:
                _require_same_request(self._path, earlier, debit)
                if earlier.noise == SEEDED:
                    return earlier
            _require_attempts(self._path, debit)
            _require_within(self._path, contents, events, budget)
            self._append(descriptor, debit)
        return debit

    def release(self, debit: Debit, payload: str) -> None:
        """The digest of the bytes that came of `debit` is on disk, fsynced, and they may be sent now.

        Args:
            debit: of this ledger.
            payload: SHA-256 of the bytes, hexadecimal.

        Raises:
            LedgerError: other bytes were released under this debit; or the file cannot be trusted or written.
        """
        with self._writing() as descriptor:
            if debit not in self._contents.debits:
                raise LedgerError(
                    f"{self._path}: {debit} is not in it, so nothing may be released under it; debit it first"
                )
            earlier = self._contents.released(debit.seq)
            if earlier not in (None, payload):
                raise LedgerError(
                    f"{self._path}: debit {debit.seq} has released {earlier}, now {payload}; send what was "
                    "released, or nothing: one debit pays for one reply"
                )
            if earlier is None:
                seq = len(self._contents.digests)
                self._append(descriptor, Release(seq=seq, debit=debit.seq, payload=payload))

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """The ledger under its lock, read again."""
        with as_ledger_error(self._path), locked(self._path) as descriptor:
            contents = repaired(descriptor, self._path)
            _require_same(self._path, contents.header, self.header)
            require_reached(self._path, contents, marked(self._mark))
            self._contents = contents
            yield descriptor

    def _append(self, descriptor: int, entry: Debit | Release) -> None:
        append(descriptor, self._path, self._contents, entry)
        self._contents = repaired(descriptor, self._path)
        if self._mark is not None:
            set_mark(self._mark, Witness(seq=entry.seq, head=self._contents.head))


def _find(contents: Contents, run: str, round: int) -> Debit | None:
    found = [debit for debit in contents.debits if (debit.run, debit.round) == (run, round)]
    return found[-1] if found else None


def _require_same_request(path: Path, earlier: Debit, asked: Debit) -> None:
    for name in ("request_digest", "events", "max_grad_norm"):
        if getattr(earlier, name) != getattr(asked, name):
            raise LedgerError(
                f"{path}: round {earlier.round} of run {earlier.run!r} (entry {earlier.seq}) was debited with "
                f"{name} {getattr(earlier, name)}, now asked with {getattr(asked, name)}; "
                "refuse the request: one round is answered once"
            )


def _require_attempts(path: Path, debit: Debit) -> None:
    if debit.attempt > MOST_ATTEMPTS:
        raise LedgerError(
            f"{path}: round {debit.round} of run {debit.run!r} was paid {MOST_ATTEMPTS} times and left no reply; "
            "look for what stops its training before it costs more"
        )


def _require_within(path: Path, contents: Contents, events: tuple[DpEvent, ...], budget: Budget) -> None:
    if would_exceed([debit.events for debit in contents.debits], events, budget):
        raise PrivacyError(
            f"{path}: {len(contents.debits)} participations are spent; {events} would pass {budget}; "
            "refuse the round, or agree on a new budget with the data owner"
        )


def _require_owner(path: Path, found: Header, client: str, noise_kind: str) -> None:
    for name, is_now, wanted in (("client", found.client, client), ("noise", found.noise, noise_kind)):
        if is_now != wanted:
            raise LedgerError(
                f"{path}:1: foreign, its {name} is {is_now!r}, opened for {wanted!r}; "
                "name the ledger that these records have"
            )


def _require_same(path: Path, found: Header, wanted: Header) -> None:
    _require_owner(path, found, wanted.client, wanted.noise)
    if found.dataset_fingerprint != wanted.dataset_fingerprint:
        raise LedgerError(
            f"{path}:1: foreign, it is of other records than those read now; restore them. What any of these "
            "records spent in this ledger counts for ever: a new ledger's budget is only what it left"
        )
