"""What a tracker is to a run: somewhere that takes its figures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """What a tracker goes on from. run: its name for the run; told: the last round it has, -1 before any."""

    run: str
    told: int = -1


class Tracker(Protocol):
    """Somewhere figures are kept. Any method may raise anything: the run goes on without it."""

    def round(self, number: int, found: Mapping[str, float]) -> None:
        """The figures of a round are there; rounds come in order, 0 is the zero-step model."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is finished, and this is what came of it."""
        ...

    def close(self, *, finished: bool) -> None:
        """Nothing more comes from this process."""
        ...


Opened: TypeAlias = tuple[Tracker, Tracked]
Open: TypeAlias = Callable[[Path, dict[str, Any], Tracked], Opened]
"""Opens a tracker for a run directory and its config, going on from what it has."""
