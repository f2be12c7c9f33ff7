"""Cells side by side until all are finished, told as they end: what a comparison and a sweep have in common."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.compare.cells import Cell, longest_first, require_unchanged
from fedlora.config.schema import RunConfig
from fedlora.disk import make_directory
from fedlora.export.words import duration, score
from fedlora.runs.rundir import STATES, finished_summary
from fedlora.runtime.cells import finish_all
from fedlora.runtime.prepare import Shared

Tell = Callable[[str], None]
"""Takes a line of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where cells run. directory: around them; address: of a Ray cluster, None starts one here; workers: None, one a
    core; go_on: the command that goes on with an interrupted one.
    """

    directory: Path
    address: str | None
    workers: int | None
    go_on: str


def finish(cells: Sequence[Cell], where: Where, tell: Tell, what: str) -> list[str]:
    """Every cell is finished, but for those that failed, which are returned in words.

    Args:
        cells: those begun before go on, and finished ones are left alone.
        where: they are to run.
        tell: hears of each as it ends, with the time that is left.
        what: a cell is called.

    Raises:
        ConfigError: a directory holds another run; nothing was started.
        IncompleteError: the cluster is lost.
    """
    require_unchanged(cells)
    due = longest_first([cell for cell in cells if finished_summary(cell.run_dir) is None])
    if len(due) < len(cells):
        tell(f"{len(cells) - len(due)} of {len(cells)} {what}s are finished already")
    if not due:
        return []
    make_directory(due[0].run_dir.parent)
    by_directory = {cell.run_dir: cell for cell in due}
    runtime = due[0].config.runtime.model_copy(
        update={
            "address": where.address,
            "workers": "auto" if where.workers is None else where.workers,
        }
    )
    failures: list[str] = []
    began, done, total = time.monotonic(), 0.0, sum(cell.work for cell in due)
    runs = [(cell.config, cell.run_dir) for cell in due]
    shared = shared_by(cells, where.directory)
    for number, ended in enumerate(finish_all(runs, runtime, where.directory, where.go_on, shared), 1):
        cell = by_directory[ended.run_dir]
        done += cell.work
        left_s = (time.monotonic() - began) * (total - done) / done
        if ended.error is not None:
            failures.append(f"{cell.run_dir.name}: {ended.error}")
        news = f"FAILED: {ended.error}" if ended.error is not None else _reached(cell)
        place = f"{what} {len(cells) - len(due) + number}/{len(cells)}"
        left = f"; {duration(max(left_s, 1))} left" if number < len(due) else ""
        tell(f"{place}  {cell.run_dir.name}: {news}  ({duration(ended.seconds)}{left})")
    return failures


def shared_by(cells: Sequence[Cell], directory: Path) -> Shared | None:
    """What cells share: counted over all of them, the finished too, so that one that goes on ends as it would have."""

    def alone(config: RunConfig) -> bool:
        return config.runtime.cache_prefix is False or config.model.gradient_checkpointing

    if any(alone(cell.config) for cell in cells):
        return None
    return Shared(directory=directory.absolute() / STATES, draws=sum(cell.work for cell in cells))


def _reached(cell: Cell) -> str:
    summary = summary_of(cell)
    return f"{summary['metric']} {score(str(summary['metric']), summary['score'])}"


def incomplete(failures: Sequence[str], total: int, what: str, go_on: str) -> str:
    """What to say where some failed: the first few, and how to go on."""
    first = "\n".join(f"  {failure}" for failure in failures[:3])
    more = f"\n  and {len(failures) - 3} more" if len(failures) > 3 else ""
    mend = f"mend that, then give the same command again: {go_on}"
    return f"{len(failures)} of {total} {what} failed:\n{first}{more}\n{mend}"


def summary_of(cell: Cell) -> Mapping[str, Any]:
    """summary.json of a cell that is finished."""
    summary = finished_summary(cell.run_dir)
    assert summary is not None  # it was finished a moment ago
    return summary
