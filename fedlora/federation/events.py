"""What a run tells whoever watches it. Listeners only look: nothing they do changes a result."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedlora.values import Refusal, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The run began something that takes a while."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something to know of the run, in a sentence; it changes nothing."""

    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """All is set up; the first round follows."""

    clients: int
    rounds: int
    private: bool
    run_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDone:
    """One reply is in. outcome: answered, or the reason of a refusal."""

    round: int
    client: str
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDone:
    """A round is on disk. round: its line of rounds.jsonl; eta_s: seconds still to go, if it can be told."""

    round: dict[str, Any]
    eta_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDone:
    """The run is finished. summary: as in summary.json."""

    summary: dict[str, Any]


Event: TypeAlias = Stage | Note | RunStarted | ClientDone | RoundDone | RunDone
Listener: TypeAlias = Callable[[Event], None]


def outcome(reply: Reply) -> str:
    """`answered`, or the code of a refusal."""
    return reply.reason.value if isinstance(reply, Refusal) else "answered"
