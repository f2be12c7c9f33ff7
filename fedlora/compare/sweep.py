"""A sweep: every setting of a grid with every seed, each an ordinary run directory; then one table."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.compare.arms import Arm
from fedlora.compare.cells import Cell, Source, cells_of
from fedlora.compare.finish import Tell, Where, finish
from fedlora.compare.grid import Axis, Setting, axes_of, checked, settings_of
from fedlora.compare.statistics import CONFIDENCE, estimate
from fedlora.compare.sweep_page import csv_text, html_page
from fedlora.disk import make_directory, write_durably
from fedlora.export.words import HIGH_IS_GOOD
from fedlora.runs.rundir import STATES, finished_summary, locked


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is to be run. grids: as `--grid` takes them. seeds: runs of each setting, from the config's seed upwards."""

    source: Source
    grids: Sequence[str]
    seeds: int
    where: Where


def sweep(request: Sweep, tell: Tell) -> tuple[dict[str, Any], list[str]]:
    """sweep.json, .csv and .html hold what finished runs amount to; and the runs that failed, in words.

    Raises:
        ConfigError: a key, a value or a combination is wrong, or a directory holds another run; nothing was started.
    """
    axes = axes_of(request.grids)
    settings = settings_of(axes)
    cells = [_cells(request, setting) for setting in settings]
    directory = request.where.directory
    make_directory(directory)
    with locked(directory):
        failures = finish([cell for own in cells for cell in own], request.where, tell, "run")
        shutil.rmtree(directory / STATES, ignore_errors=True)
        found = amounts(axes, list(zip(settings, cells, strict=True)), finished_summary)
        write_durably(directory / "sweep.json", json.dumps(found, indent=2) + "\n")
        write_durably(directory / "sweep.csv", csv_text(found))
        write_durably(directory / "sweep.html", html_page(found))
    return found, failures


def _cells(request: Sweep, setting: Setting) -> list[Cell]:
    config = checked(request.source, setting)
    return cells_of(
        request.source,
        Arm(name=setting.name, reason="a setting of the grid", overrides=setting.overrides()),
        epsilons=[] if config.privacy == "none" else [config.privacy.target_epsilon],
        seeds=[config.seed + number for number in range(request.seeds)],
        setting=lambda _: None,
        private_runs=None,
        directory=request.where.directory / "runs",
    )


def amounts(
    axes: Sequence[Axis],
    runs: Sequence[tuple[Setting, Sequence[Cell]]],
    summary_of: Callable[[Path], Mapping[str, Any] | None],
) -> dict[str, Any]:
    """sweep.json: equal for equal runs, whatever came between.

    Args:
        axes: of the grid.
        runs: each setting with its cells.
        summary_of: summary.json by run directory; None where a run is not finished.
    """
    summaries = {cell.run_dir: summary_of(cell.run_dir) for _, own in runs for cell in own}
    there = [summary for summary in summaries.values() if summary is not None]
    metrics = {summary["metric"] for summary in there}
    metric = metrics.pop() if len(metrics) == 1 else None
    private = [cell for _, own in runs for cell in own if cell.config.privacy != "none"]
    return {
        "finished": len(there) == len(summaries),
        "metric": metric,
        "high_is_good": HIGH_IS_GOOD.get(str(metric), True),
        "confidence": CONFIDENCE,
        "seeds": sorted({cell.seed for _, own in runs for cell in own}),
        "noise_source": next((s["noise_source"] for s in there if s["private"]), None),
        "private_runs": len(private),
        "axes": [{"key": axis.key, "values": list(axis.values)} for axis in axes],
        "settings": [_amount(setting, own, summaries) for setting, own in runs],
    }


def _amount(setting: Setting, cells: Sequence[Cell], summaries: Mapping[Any, Any]) -> dict[str, Any]:
    """One row: mean, interval and epsilon over the seeds that are finished; None where there is none."""
    held = {cell.seed: summaries[cell.run_dir] for cell in cells if summaries[cell.run_dir] is not None}
    score = estimate([summary["score"] for summary in held.values()]) if held else None
    spent = [summary["epsilon_max"] for summary in held.values() if summary["private"]]
    return {
        "set": dict(setting.values),
        "mean": None if score is None else score.mean,
        "interval": None if score is None or score.interval is None else list(score.interval),
        "private": cells[0].config.privacy != "none",
        "epsilon_max": max(spent, default=None),
        "runs": [_run(cell, summaries[cell.run_dir]) for cell in cells],
    }


def _run(cell: Cell, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    keys = ("score", "score_before", "epsilon_max", "delta", "state_sha256")
    told = {key: None if summary is None else summary[key] for key in keys}
    return {"seed": cell.seed, "run_dir": cell.run_dir.name, **told}
