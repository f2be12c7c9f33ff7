"""What a monitor can see: a run's directory, read again only when its files changed, by one reader at a time."""

import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedlora.errors import FedLoraError, IncompleteError
from fedlora.federation.absences import MISSED
from fedlora.runs.rundir import SPENT, run_rounds
from fedlora.runs.summary import run_status

LEAST_AGE_S = 1.0
"""Epsilon is computed anew at most this often: a mechanism with thousands of steps may take seconds."""
REST = 4
"""And not before this many times as long as it took last, so that looking costs a fifth of a core at most."""
READ = ("config.yaml", "roster.json", "rounds.jsonl", MISSED, SPENT, "summary.json")

Signature: TypeAlias = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What was found, or why nothing was."""

    signature: Signature
    found: dict[str, Any] | None
    trouble: FedLoraError | None
    rests_until: float

    def result(self) -> dict[str, Any]:
        if self.found is None:
            assert self.trouble is not None
            raise self.trouble
        return self.found


def found_in(run_dir: Path) -> dict[str, Any]:
    """`summary.run_status`, and how many replies refused for which reason.

    Raises:
        ConfigError, IncompleteError, LedgerError: as `run_status` does.
    """
    refused = [text for line in run_rounds(run_dir) for text in line["refused"].values()]
    reasons = Counter(reason for text in refused for reason in text.split("; "))
    return {**run_status(run_dir), "refusals_by_reason": dict(sorted(reasons.items()))}


class View:
    """One run's directory. All methods may be called from any thread; none writes anything."""

    def __init__(self, run_dir: Path, *, least_age_s: float = LEAST_AGE_S) -> None:
        self._run_dir = run_dir
        self._least_age_s = least_age_s
        self._computing, self._held = threading.Lock(), None
        self._reading, self._lines = threading.Lock(), ((), [])

    def status(self) -> dict[str, Any]:
        """`found_in` the directory: as it is now, or was a moment ago.

        Raises:
            IncompleteError: nothing can be told yet.
            ConfigError: a file of the run is damaged.
            LedgerError: a ledger is.
        """
        held: _Held | None = self._held
        if held is not None and (self._rests(held) or self._signature() == held.signature):
            return held.result()
        if not self._computing.acquire(blocking=held is None):
            assert held is not None
            return held.result()
        try:
            held, now = self._held, self._signature()
            if held is None or held.signature != now:
                held = self._held = self._computed(now)
            return held.result()
        finally:
            self._computing.release()

    def rounds(self, first: int) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl from round `first` on; none before the run began.

        Raises:
            ConfigError: the file is damaged.
        """
        with self._reading:
            now = self._signature(("rounds.jsonl",))
            if now != self._lines[0]:
                self._lines = (now, run_rounds(self._run_dir)) if self.has_begun() else ((), [])
            lines = self._lines[1]
        return [line for line in lines if line["round"] >= first]

    def last_round(self) -> dict[str, float]:
        """Of the last round: how many were asked, answered, refused and rejected, and its single numbers; else nothing.

        `reply_bytes`: of one update as it came to a server.

        Raises:
            ConfigError: the file is damaged.
        """
        lines = self.rounds(1)
        if not lines:
            return {}
        counts = {name: len(lines[-1][name]) for name in ("asked", "answered", "refused", "rejected")}
        numbers = {name: lines[-1][name] for name in ("seconds", "public_clip_share") if name in lines[-1]}
        frame = next((self._run_dir / "replies").glob("*.frame"), None)
        sign = None if frame is None else _sign(frame)  # it may be erased meanwhile
        return {**counts, **numbers, **({} if sign is None else {"reply_bytes": sign[2]})}

    def has_begun(self) -> bool:
        """Whether there is a run at all."""
        return (self._run_dir / "config.yaml").exists()

    def is_finished(self) -> bool:
        """Whether no round will follow."""
        return (self._run_dir / "summary.json").exists()

    def _rests(self, held: _Held) -> bool:
        """The end of a run is told at once, since followers ask for the last figures then; it costs no computing."""
        ended_meanwhile = self.is_finished() and not (held.found or {}).get("finished")
        return time.monotonic() < held.rests_until and not ended_meanwhile

    def _computed(self, signature: Signature) -> _Held:
        began, found, trouble = time.monotonic(), None, None
        try:
            found = self._found()
        except FedLoraError as error:
            trouble = error
        ended = time.monotonic()
        rest = max(self._least_age_s, REST * (ended - began))
        return _Held(signature=signature, found=found, trouble=trouble, rests_until=ended + rest)

    def _found(self) -> dict[str, Any]:
        if not self.has_begun():
            raise IncompleteError("the run has not begun: the server waits for its nodes; ask again later")
        return found_in(self._run_dir)

    def _signature(self, names: tuple[str, ...] = READ) -> Signature:
        paths = [self._run_dir / name for name in names]
        if names is READ:
            paths += sorted((self._run_dir / "ledgers").glob("*.jsonl"))
        return tuple(sign for path in paths if (sign := _sign(path)) is not None)


def _sign(path: Path) -> tuple[str, int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return path.name, found.st_ino, found.st_size, found.st_mtime_ns
