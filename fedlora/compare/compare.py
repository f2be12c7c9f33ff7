"""The whole comparison: trials, then cells, each an ordinary run directory; then what they amount to."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.compare.arms import Arm, arms_of, chosen, control_of, references
from fedlora.compare.cells import Cell, Source, cells_of, longest_first, require_unchanged
from fedlora.compare.comparison import HIGH_IS_GOOD, comparison
from fedlora.compare.table import markdown
from fedlora.compare.tuning import Choice, Tuning, choose, private_runs, trial_epsilon, trials_of
from fedlora.config.schema import RunConfig
from fedlora.disk import make_directory, write_durably
from fedlora.errors import ConfigError, IncompleteError
from fedlora.export.charts import Series, interval_chart, standalone
from fedlora.export.words import duration, score
from fedlora.runs.rundir import finished_summary
from fedlora.runtime.cells import finish_all

Tell = Callable[[str], None]
"""Takes a line of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be compared.

    epsilons: none takes the config's own. own: the user's arms, `name: key=value ...`. against: None, the first method.
    tuning: None takes every arm as it is. go_on: the command that goes on with an interrupted comparison.
    """

    source: Source
    methods: Sequence[str]
    own: Sequence[str]
    seeds: int
    epsilons: Sequence[float]
    tuning: Tuning | None
    control: bool
    against: str | None
    references: bool
    workers: int | None
    directory: Path
    go_on: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A request, looked through: nothing in it can be wrong any more but data and models."""

    config: RunConfig
    arms: list[Arm]
    epsilons: list[float]
    seeds: list[int]
    against: str
    control: tuple[str, str] | None


def compare(request: Request, tell: Tell) -> tuple[dict[str, Any], list[str]]:
    """comparison.json, .md and .svg hold what finished cells amount to; and the cells that failed, in words.

    Raises:
        ConfigError: an arm, an epsilon or a proxy is wrong, or a directory holds another run; nothing was started.
        IncompleteError: a trial failed, so that nothing could be chosen.
    """
    plan = _plan(request)
    _cells(request, plan, {})  # what is wrong with a cell is told before the first trial
    choices, told = _tuned(request, plan, tell)
    cells = _cells(request, plan, choices)
    failures = _finish(cells, request, tell, "cell")
    found = comparison(
        plan.arms,
        cells,
        [(cell, summary) for cell in cells if (summary := finished_summary(cell.run_dir)) is not None],
        against=plan.against,
        tuning=told,
        choices=choices,
        control=plan.control,
    )
    _write(found, request.directory)
    return found, failures


def _plan(request: Request) -> _Plan:
    config = request.source.config()
    known = arms_of(config, request.own)
    # The user's own arms are compared without being named once more.
    own = list(known)[len(known) - len(request.own) :] if request.own else []
    arms = chosen(known, [*request.methods, *(name for name in own if name not in request.methods)])
    if not arms:
        raise ConfigError(
            "--methods: nothing to compare; name one at least, for example --methods fedsvd,ffa"
        )
    twin = control_of(arms[0], config) if request.control else None
    if twin is not None:
        arms.append(twin)
    if request.references:
        arms += [arm for arm in references(config) if arm not in arms]
    against = request.against or arms[0].name
    if against not in [arm.name for arm in arms]:
        names = ", ".join(arm.name for arm in arms)
        raise ConfigError(f"--against {against}: it is not compared; write one of {names}")
    return _Plan(
        config=config,
        arms=arms,
        epsilons=_epsilons(request.epsilons, config),
        seeds=[config.seed + number for number in range(request.seeds)],
        against=against,
        control=None if twin is None else (twin.name, arms[0].name),
    )


def _epsilons(asked: Sequence[float], config: RunConfig) -> list[float]:
    if config.privacy == "none":
        if asked:
            raise ConfigError(
                "--epsilons: the config says privacy: none, which has none; leave --epsilons out, or give it a budget"
            )
        return []
    return sorted(set(asked)) or [config.privacy.target_epsilon]


def _tuned(request: Request, plan: _Plan, tell: Tell) -> tuple[dict[str, Choice], dict[str, Any] | None]:
    """By arm what its trials chose, and what all trials share. The control has the choice of its twin."""
    tuning = request.tuning
    if tuning is None:
        return {}, None
    epsilon = trial_epsilon(plan.epsilons, tuning) if plan.epsilons else None
    twin = plan.control[0] if plan.control else None
    directory = request.directory / "trials"
    trials = {
        arm.name: trials_of(request.source, arm, tuning, epsilon, directory)
        for arm in plan.arms
        if arm.tuned and arm.name != twin
    }
    every = [trial for cells in trials.values() for trial in cells]
    if failures := _finish(every, request, tell, "trial"):
        raise IncompleteError(incomplete(failures, len(every), "trials", request.go_on))
    choices = {name: _choice(cells, tell) for name, cells in trials.items()}
    if plan.control and plan.control[1] in choices:
        choices[plan.control[0]] = choices[plan.control[1]]
    told = {
        "trials": tuning.trials,
        "proxy": None if tuning.proxy is None else str(tuning.proxy),
        "epsilon": epsilon,
        "seed": every[0].seed if every else None,
        "private_runs": private_runs(tuning, plan.config),
    }
    return choices, told


def _choice(trials: Sequence[Cell], tell: Tell) -> Choice:
    summaries = {trial.run_dir: _summary(trial) for trial in trials}
    metric = str(next(iter(summaries.values()))["metric"])
    scores = {run_dir: summary["score"] for run_dir, summary in summaries.items()}
    choice = choose(trials, scores, high_is_good=HIGH_IS_GOOD[metric])
    norm = "" if choice.best.max_grad_norm is None else f", max_grad_norm {choice.best.max_grad_norm:g}"
    reached = score(metric, dict(choice.tried)[choice.best])
    tell(f"{trials[0].arm}: of {len(trials)} trials the best is lr {choice.best.lr:g}{norm} ({reached})")
    return choice


def _summary(cell: Cell) -> Mapping[str, Any]:
    summary = finished_summary(cell.run_dir)
    assert summary is not None  # it was finished a moment ago
    return summary


def _cells(request: Request, plan: _Plan, choices: Mapping[str, Choice]) -> list[Cell]:
    return [
        cell
        for arm in plan.arms
        for cell in cells_of(
            request.source,
            arm,
            epsilons=plan.epsilons,
            seeds=plan.seeds,
            setting=choices[arm.name].best if arm.name in choices else None,
            private_runs=private_runs(request.tuning, plan.config) if arm.name in choices else None,
            directory=request.directory / "cells",
        )
    ]


def _finish(cells: Sequence[Cell], request: Request, tell: Tell, what: str) -> list[str]:
    """Every cell is finished, but for those that failed, which are returned in words."""
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
            "address": request.source.config().runtime.address,
            "workers": "auto" if request.workers is None else request.workers,
        }
    )
    failures: list[str] = []
    began, done, total = time.monotonic(), 0.0, sum(cell.work for cell in due)
    runs = [(cell.config, cell.run_dir) for cell in due]
    for number, ended in enumerate(finish_all(runs, runtime, request.directory, request.go_on), 1):
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


def _reached(cell: Cell) -> str:
    summary = _summary(cell)
    return f"{summary['metric']} {score(str(summary['metric']), summary['score'])}"


def incomplete(failures: Sequence[str], total: int, what: str, go_on: str) -> str:
    """What to say where some failed: the first few, and how to go on."""
    first = "\n".join(f"  {failure}" for failure in failures[:3])
    more = f"\n  and {len(failures) - 3} more" if len(failures) > 3 else ""
    mend = f"mend that, then give the same command again: {go_on}"
    return f"{len(failures)} of {total} {what} failed:\n{first}{more}\n{mend}"


def _write(found: Mapping[str, Any], directory: Path) -> None:
    """The three files are durable."""
    write_durably(directory / "comparison.json", json.dumps(found, indent=2) + "\n")
    write_durably(directory / "comparison.md", markdown(found))
    write_durably(directory / "comparison.svg", standalone(_chart(found)))


def _chart(found: Mapping[str, Any]) -> str:
    metric, results = str(found["metric"]), found["results"]
    columns = ["no privacy" if r["epsilon"] is None else f"{r['epsilon']:g}" for r in results]
    series = [
        Series(
            name=name,
            values=[_point(result["arms"][name], metric) for result in results],
        )
        for name in found["arms"]
    ]
    return interval_chart(
        columns,
        series,
        title=f"Test {metric} against epsilon, means and 95 % intervals over {len(found['seeds'])} seeds",
        across="epsilon",
        show=lambda value: score(metric, value),
    )


def _point(arm: Mapping[str, Any], metric: str) -> tuple[float, float, float] | None:
    """The interval as drawn: that of an accuracy ends where accuracies do."""
    if arm["mean"] is None:
        return None
    low, high = arm["interval"] or (arm["mean"], arm["mean"])
    return (max(low, 0.0), arm["mean"], min(high, 1.0)) if metric == "accuracy" else (low, arm["mean"], high)
