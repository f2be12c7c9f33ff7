"""Replies that a data owner's node has given, so that one debit is released once."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Outbox:
    """Replies already given, one file each: a line of JSON (run, round, digest of the request), the frame."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process of this node answers meanwhile."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def find(self, run: str, round_: int) -> tuple[str, bytes] | None:
        """The digest of the request that was answered in this round, and the answer."""
        path = self._path(run, round_)
        if not path.exists():
            return None
        line, _, frame = path.read_bytes().partition(b"\n")
        return json.loads(line)["request"], frame

    def given(self) -> set[tuple[str, int]]:
        """Run and round of every reply."""
        found = set()
        for path in self.directory.glob("*.reply"):
            with path.open("rb") as file:
                words = json.loads(file.readline())
            found.add((words["run"], words["round"]))
        return found

    def keep(self, run: str, round_: int, digest: str, frame: bytes) -> None:
        """The answer is durable and may be sent: written aside, fsynced, renamed."""
        path = self._path(run, round_)
        aside = path.with_suffix(".part")
        line = json.dumps({"run": run, "round": round_, "request": digest}, sort_keys=True)
        with aside.open("wb") as file:
            file.write(line.encode() + b"\n" + frame)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _path(self, run: str, round_: int) -> Path:
        # The run's name is the server's choice, so it is no file name of ours.
        return self.directory / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}-{round_:06d}.reply"
