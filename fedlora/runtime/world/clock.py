"""The virtual clock of a run and the replies that are on their way, on disk.

world/round-000012.json             when round 12 began, who was at work then, and what became of round 11
world/replies/round-000011/3.frame  the reply of the fourth of round 11's cohort, till nobody can ask for it again

The file of a round is written before the round before it can be committed; a round that is done again, after any
interruption, reads the same file and writes the same next one.
"""

import json
import shutil
from collections.abc import Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.disk import fsync, make_directory, write_durably
from fedlora.errors import ConfigError, IncompleteError, WireError
from fedlora.runtime.world.window import Errand, Moment, Window
from fedlora.transport.wire import decode_reply, encode_reply
from fedlora.values import Reply


class Clock:
    """The directory `world` of a run."""

    def __init__(self, run_dir: Path, world_digest: str, completed: int) -> None:
        """Begins at 0 in a new run, and goes on in one that has completed rounds.

        Raises:
            IncompleteError: rounds are completed, but the clock is gone.
            ConfigError: the files of the world were changed since the run began.
        """
        self.directory = run_dir / "world"
        self.world_digest = world_digest
        make_directory(self.directory)
        newest = self._newest(completed + 1)
        if newest is None:
            if completed > 0:
                raise IncompleteError(
                    f"{self.directory} is empty, but {completed} rounds are done; restore it, or start again in "
                    f"another directory"
                )
            self._write(1, Moment(), {})
        elif newest["world"] != world_digest:
            raise ConfigError(
                f"{self.directory} was made with another trace or speed file than the config names now; restore the "
                f"file, or choose another output"
            )

    def moment(self, round_: int) -> Moment:
        """Where a round begins. One that nobody was asked in took no time and has no file."""
        newest = self._newest(round_)
        if newest is None:
            raise IncompleteError(
                f"{_file(self.directory, 1)} is missing; restore it, or start again elsewhere"
            )
        pending = tuple(Errand(**words) for words in newest["pending"])
        return Moment(began_s=newest["began_s"], pending=pending)

    def advance(self, round_: int, began: Moment, window: Window) -> None:
        """The round is over: its late replies and the moment after it are durable."""
        waiting = [errand for errand in window.after.pending if errand.round == round_ and errand.arrives]
        for errand in waiting:
            fsync(_frame(self.directory, errand))
        if waiting:
            directory = _frame(self.directory, waiting[0]).parent
            fsync(directory)
            fsync(directory.parent)
        self._write(round_ + 1, window.after, _told(round_, began, window))

    def keep(self, reply: Reply, number: int) -> None:
        """The reply of the cohort's client `number` is on the disk, but not yet durable."""
        path = _frame_of(self.directory, reply.round, number)
        make_directory(path.parent)
        path.write_bytes(encode_reply(reply))

    def reply(self, errand: Errand) -> Reply:
        """What came of an errand.

        Raises:
            IncompleteError: its frame is gone or damaged.
        """
        path = _frame(self.directory, errand)
        try:
            return decode_reply(path.read_bytes())
        except (OSError, WireError) as error:
            raise IncompleteError(
                f"{path}, a reply on its way, cannot be read ({error}); restore it, or start again elsewhere"
            ) from None

    def forget(self, errand: Errand) -> None:
        """The reply is off the disk: whoever wants it again asks the client again."""
        _frame(self.directory, errand).unlink(missing_ok=True)

    def prune(self, round_: int) -> None:
        """Only what a run may still ask for is left, now that `round_` begins.

        The newest checkpoint may turn out to be damaged, so the round before may be done once more.
        """
        kept: Set[Path] = {
            _frame(self.directory, errand)
            for begins in {max(1, round_ - 1), round_}
            for errand in self.moment(begins).pending
            if errand.arrives
        }
        for directory in (self.directory / "replies").glob("round-*"):
            frames = list(directory.iterdir())
            for path in frames:
                if path not in kept:
                    path.unlink()
            if kept.isdisjoint(frames):
                shutil.rmtree(directory)

    def _newest(self, at_most: int) -> dict[str, Any] | None:
        path = _file(self.directory, at_most)
        if not path.exists():
            earlier = [found for found in self.directory.glob("round-*.json") if found.name < path.name]
            path = max(earlier, default=None)
        return None if path is None else json.loads(path.read_text())

    def _write(self, round_: int, moment: Moment, before: dict[str, Any]) -> None:
        words = {
            "round": round_,
            "world": self.world_digest,
            "began_s": moment.began_s,
            "pending": [asdict(errand) for errand in moment.pending],
            "before": before,
        }
        write_durably(_file(self.directory, round_), _json(words))


def told(run_dir: Path, round_: int) -> dict[str, Any]:
    """What became of a round by the virtual clock; empty where nobody was asked, or there is no world.

    virtual_seconds: how long it took; virtual_s: the time at its end; late: by client, how stale each reply to an
    earlier round is by then, in rounds and in virtual seconds since it was asked; away, busy, lost, dropped: clients,
    see Window.
    """
    path = _file(run_dir / "world", round_ + 1)
    return json.loads(path.read_text())["before"] if path.exists() else {}


def erase_replies(run_dir: Path, client: str) -> int:
    """No reply of the client is left in the run's world, and none that no round waits for; how many were the client's.

    Where no world is, nothing is done. The files stop naming a frame before it goes, so that this may be killed at any
    moment and called again.
    """
    directory = run_dir / "world"
    awaited: set[Path] = set()
    for path in sorted(directory.glob("round-*.json")):
        words = json.loads(path.read_text())
        pending = [Errand(**errand) for errand in words["pending"]]
        others = [errand for errand in pending if errand.client != client]
        if len(others) < len(pending):
            write_durably(path, _json({**words, "pending": [asdict(errand) for errand in others]}))
        awaited |= {_frame(directory, errand) for errand in others}
    senders = {frame: _sender(frame) for frame in (directory / "replies").glob("round-*/*.frame")}
    for frame, sender in senders.items():
        if sender == client or frame not in awaited:
            frame.unlink()
    for folder in (directory / "replies").glob("round-*"):
        fsync(folder)
    return sum(sender == client for sender in senders.values())


def _sender(frame: Path) -> str | None:
    """Whose reply it is; None where a kill left half of one."""
    try:
        return decode_reply(frame.read_bytes()).client
    except WireError:
        return None


def _told(round_: int, began: Moment, window: Window) -> dict[str, Any]:
    return {
        "round": round_,
        "virtual_seconds": window.after.began_s - began.began_s,
        "virtual_s": window.after.began_s,
        "late": {
            errand.client: {"rounds": round_ - errand.round, "seconds": window.after.began_s - errand.asked_s}
            for errand in window.late
        },
        "away": list(window.away),
        "busy": list(window.busy),
        "lost": [errand.client for errand in window.lost],
        "dropped": [errand.client for errand in window.dropped],
    }


def _json(words: dict[str, Any]) -> str:
    return json.dumps(words, sort_keys=True) + "\n"


def _frame(directory: Path, errand: Errand) -> Path:
    return _frame_of(directory, errand.round, errand.number)


def _frame_of(directory: Path, round_: int, number: int) -> Path:
    return directory / "replies" / _round(round_) / f"{number}.frame"


def _file(directory: Path, round_: int) -> Path:
    return directory / f"{_round(round_)}.json"


def _round(number: int) -> str:
    return f"round-{number:06d}"
