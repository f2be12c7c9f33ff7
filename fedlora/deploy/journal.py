"""What a server heard: every update's bytes, by their digest, and what its node said it spent.

replies/<sha256>.frame   an update as it came, on disk before anybody uses it; gone once its client is forgotten
spent.jsonl              a line for each: who, for which round, heard in which, its digest, its events, its debit

A server that died in mid-round finds here what it had heard and asks only the others. Played again from the first
state, the journal gives every state of the run bit for bit (`deploy.replay`). It also is the ledgers' witness: a reply
tells where its debit stands in the node's ledger, and a ledger that is put back to an earlier state would have to tell
a place it told before; other bytes for a round that was answered are a second release.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from fedlora.deploy.soundness import Soundness
from fedlora.disk import append_durably, fsync, make_directory, whole_lines, write_durably
from fedlora.errors import ConfigError, IncompleteError, WireError
from fedlora.federation.cohort import Cohort
from fedlora.transport.wire import decode_reply, encode_reply
from fedlora.values import ClientUpdate, Refusal, RefusalReason, Reply, TrainRequest, Witness

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Told:
    """The line of the ledger that paid for a reply, and the digest of the reply's bytes."""

    ledger: Witness
    payload: str


class Journal:
    """What each client told, by the round it is for and by the round it came in."""

    def __init__(self, path: Path, forgotten: Collection[str] = ()) -> None:
        """Reads what was written. ConfigError: by another version of fedlora, or by hand.

        forgotten: of these clients only what they said they spent is kept, and where it stands in their ledgers.
        """
        self.path = path
        self.forgotten = frozenset(forgotten)
        self.replies = path.parent / "replies"
        self._seen: dict[str, dict[int, _Told]] = {}
        self._heard: dict[int, list[str]] = {}
        try:
            for words in whole_lines(path):
                seq, head = words["ledger"]
                told = _Told(Witness(seq=seq, head=head), words["payload"])
                self._note(words["client"], words["round"], words["heard"], told)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: not what this fedlora writes ({error!r}); go on with the fedlora that began this run"
            ) from error

    def furthest(self, client: str) -> Witness | None:
        """The line furthest down this client's ledger that any of its replies named."""
        seen = [told.ledger for told in self._seen.get(client, {}).values()]
        return max(seen, key=lambda witness: witness.seq, default=None)

    def objection(self, update: ClientUpdate) -> str | None:
        """Why the place of its debit contradicts what the client told before; None if it does not."""
        if update.ledger is None or update.ledger.seq < 1:
            return f"it names no line of a ledger ({update.ledger})"
        told = _told(update, update.ledger)
        for round_, seen in sorted(self._seen.get(update.client, {}).items()):
            if round_ == update.round and seen != told:
                return f"round {round_} was answered by {seen}, now by {told}: released twice"
            line, other = told.ledger.seq, seen.ledger.seq
            if round_ != update.round and (line == other or (round_ < update.round) != (other < line)):
                return f"round {round_} was paid by line {other}, round {update.round} by {line}: put back"
        return None

    def write(self, update: ClientUpdate, heard: int) -> None:
        """The update is durable, and what it says it spent; heard: the round it came in."""
        assert update.ledger is not None
        told = _told(update, update.ledger)
        frame = self.replies / f"{told.payload}.frame"
        if not frame.exists() and update.client not in self.forgotten:
            make_directory(self.replies)
            write_durably(frame, encode_reply(update))
        words = {"client": update.client, "round": update.round, "heard": heard}
        words |= {"ledger": astuple(told.ledger), "payload": told.payload}
        _cut_torn_line(self.path)
        append_durably(self.path, json.dumps({**words, "spent": [astuple(e) for e in update.spent]}) + "\n")
        self._note(update.client, update.round, heard, told)

    def heard(self, round_: int) -> list[ClientUpdate]:
        """The updates that came in this round, late ones of earlier rounds included.

        Raises:
            IncompleteError: the bytes of one are gone or changed.
        """
        return [self._update(payload) for payload in self._heard.get(round_, [])]

    def _update(self, payload: str) -> ClientUpdate:
        path = self.replies / f"{payload}.frame"
        frame = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(frame).hexdigest() != payload:
            raise IncompleteError(f"{path}: an update that was heard is missing or damaged; restore it")
        update = decode_reply(frame)
        assert isinstance(update, ClientUpdate)
        return update

    def _note(self, client: str, round_: int, heard: int, told: _Told) -> None:
        self._seen.setdefault(client, {})[round_] = told
        if client not in self.forgotten and told.payload not in self._heard.setdefault(heard, []):
            self._heard[heard].append(told.payload)


def erase_updates(path: Path, client: str) -> int:
    """No update of the client is stored beside this journal; how many there were. The journal's lines stay.

    What the client spent, and the places in its ledger that it told, are no part of its updates. What a crash left
    without a line, whole or by half, counts nowhere: it is gone too where it is the client's, or nobody can tell whose.
    """
    replies = path.parent / "replies"
    senders = {f"{words['payload']}.frame": words["client"] for words in whole_lines(path)}
    held = list(replies.iterdir()) if replies.is_dir() else []
    whose = {file: senders[file.name] if file.name in senders else _sender(file) for file in held}
    for file in (file for file in held if whose[file] in (client, None)):
        file.unlink()
    if held:  # whether or not by this process: an earlier one may have died before
        fsync(replies)
    return sum(sender == client for sender in whose.values())


def _sender(file: Path) -> str | None:
    """Who gave the reply in a file; None where it holds no whole one."""
    try:
        return decode_reply(file.read_bytes()).client
    except WireError:
        return None


class Reported:
    """A Cohort whose updates are in a journal before anybody uses them."""

    def __init__(self, cohort: Cohort, journal: Journal, soundness: Soundness) -> None:
        """An update that contradicts itself, or what its client told before, is a refusal."""
        self.cohort = cohort
        self.journal = journal
        self.soundness = soundness

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort. What was heard in this round already is not asked again."""
        known = self.journal.heard(request.round)
        yield from known
        answered = {
            update.client for update in known
        }  # by a late one too: it counts, and one a round is enough
        for reply in self.cohort.ask([client for client in clients if client not in answered], request):
            if (
                isinstance(reply, Refusal)
                or reply.run != request.run
                or not 1 <= reply.round <= request.round
            ):
                yield reply  # it counts nowhere, so it is no witness either
            elif (objection := self.soundness.objection(reply)) is not None:
                log.error("%s: its update of round %d is dropped: %s", reply.client, reply.round, objection)
                yield _dropped(reply, RefusalReason.UNSOUND)
            elif (objection := self.journal.objection(reply)) is not None:
                log.error(
                    "%s: its ledger cannot be trusted, its update is dropped: %s", reply.client, objection
                )
                yield _dropped(reply, RefusalReason.LEDGER)
            else:
                self.journal.write(reply, request.round)
                yield reply

    def close(self) -> None:
        """See Cohort."""
        self.cohort.close()


def _told(update: ClientUpdate, ledger: Witness) -> _Told:
    # A frame has one way to be written, so these are the bytes that came.
    return _Told(ledger, hashlib.sha256(encode_reply(update)).hexdigest())


def _dropped(update: ClientUpdate, reason: RefusalReason) -> Refusal:
    return Refusal(client=update.client, run=update.run, round=update.round, reason=reason)


def _cut_torn_line(journal: Path) -> None:
    """A last line that a crash left without its newline goes, or the next one would be written onto it."""
    text = journal.read_bytes() if journal.exists() else b""
    if text and not text.endswith(b"\n"):
        os.truncate(journal, text.rfind(b"\n") + 1)
