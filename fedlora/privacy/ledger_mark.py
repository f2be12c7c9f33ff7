"""How far a ledger is known to have come: losing it, or putting an old one back, is noticed by that alone."""

import json
from pathlib import Path

from fedlora.disk import make_directory, write_durably
from fedlora.errors import LedgerError
from fedlora.privacy.ledger_format import RESTORE, Contents
from fedlora.values import Witness


def require_reached(path: Path, contents: Contents | None, witness: Witness | None) -> None:
    """Passes only contents that hold the line that the witness saw; None is no ledger, or nobody who saw one.

    Raises:
        LedgerError: the ledger is missing, was put back to an earlier state, or is not the one that was seen.
    """
    if witness is None:
        return
    if contents is None:
        raise LedgerError(f"{path}: missing, but it had at least {witness.seq} entries; {RESTORE}")
    if witness.seq >= len(contents.digests):
        raise LedgerError(
            f"{path}: rolled back, it has {len(contents.digests) - 1} entries and had {witness.seq}; {RESTORE}"
        )
    if contents.digests[witness.seq] != witness.head:
        raise LedgerError(
            f"{path}: not the ledger that was seen before, entry {witness.seq} differs; {RESTORE}"
        )


def marked(mark: Path | None) -> Witness | None:
    """What the file `mark` remembers; None if there is none yet, or none is wanted. LedgerError if damaged."""
    if mark is None or not mark.exists():
        return None
    try:
        words = json.loads(mark.read_text(encoding="utf-8"))
        return Witness(seq=int(words["seq"]), head=str(words["head"]))
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{mark}: no mark of a ledger ({error!r}); {RESTORE}") from error


def set_mark(mark: Path, witness: Witness) -> None:
    """The file `mark` remembers what `witness` saw, durably."""
    make_directory(mark.parent)
    write_durably(mark, json.dumps({"seq": witness.seq, "head": witness.head}) + "\n")
