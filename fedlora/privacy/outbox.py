"""Replies that a data owner's node has made, so that one debit is released once."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.disk import make_directory, waiting_for, write_durably
from fedlora.errors import LedgerError
from fedlora.values import Witness


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A reply: to which request, paid by which line of the ledger, and its bytes; none once it was acknowledged."""

    run: str
    round: int
    request_digest: str
    paid: Witness
    frame: bytes

    @property
    def payload(self) -> str:
        """The digest of its bytes, as the ledger knows them."""
        return hashlib.sha256(self.frame).hexdigest()

    @property
    def acknowledged(self) -> bool:
        """The server has it: its bytes are no longer here, and are never sent again."""
        return not self.frame


class Outbox:
    """Replies already made, one file each: a line of JSON, then the frame."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process of this node answers meanwhile."""
        make_directory(self.directory)
        with waiting_for(self.directory / ".lock"):
            yield

    def find(self, run: str, round_: int) -> Kept | None:
        """The answer of this round."""
        path = self._path(run, round_)
        return _read(path) if path.exists() else None

    def answered(self, run: str, before: int) -> list[int]:
        """The rounds of this run, earlier than `before`, that were answered."""
        rounds = [_head(path).round for path in self.directory.glob(f"{run_stem(run)}-*.reply")]
        return sorted(round_ for round_ in rounds if round_ < before)

    def furthest(self) -> Witness | None:
        """The last line of the ledger that paid for a reply here."""
        paid = [_head(path).paid for path in self.directory.glob("*.reply")]
        return max(paid, key=lambda witness: witness.seq, default=None)

    def keep(self, kept: Kept) -> None:
        """The answer is durable, in place of an earlier one of its round."""
        words = {"run": kept.run, "round": kept.round, "request": kept.request_digest}
        words |= {"seq": kept.paid.seq, "head": kept.paid.head}
        line = json.dumps(words, sort_keys=True).encode()
        write_durably(self._path(kept.run, kept.round), line + b"\n" + kept.frame)

    def forget_acknowledged(self, run: str, round_: int, heard: Witness) -> None:
        """The bytes of replies to earlier rounds of this run are gone, if the server has `heard` them or later ones.

        What remains says that there was one, and is a witness of the ledger.
        """
        for path in self.directory.glob(f"{run_stem(run)}-*.reply"):
            kept = _read(path)
            if not kept.acknowledged and kept.round < round_ and kept.paid.seq <= heard.seq:
                self.keep(replace(kept, frame=b""))

    def _path(self, run: str, round_: int) -> Path:
        return self.directory / f"{run_stem(run)}-{round_:06d}.reply"


def run_stem(run: str) -> str:
    """What names of files of this run begin with: its own name is the server's choice, so it is none of ours."""
    return hashlib.sha256(run.encode()).hexdigest()[:32]


def _read(path: Path) -> Kept:
    line, _, frame = path.read_bytes().partition(b"\n")
    return _kept(path, line, frame)


def _head(path: Path) -> Kept:
    """What is kept there, without its bytes."""
    with path.open("rb") as file:
        return _kept(path, file.readline(), b"")


def _kept(path: Path, line: bytes, frame: bytes) -> Kept:
    try:
        words = json.loads(line)
        return Kept(
            run=words["run"],
            round=words["round"],
            request_digest=words["request"],
            paid=Witness(seq=int(words["seq"]), head=str(words["head"])),
            frame=frame,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{path}: no reply that was kept ({type(error).__name__}); restore the file, it bears the ledger "
            "witness, or nothing more may be released from this data set"
        ) from error
