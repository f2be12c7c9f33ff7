"""The whole comparison: trials, then cells, each an ordinary run directory; then what they amount to."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.compare.arms import Arm
from fedlora.compare.candidates import arms_of, chosen, control_of, references
from fedlora.compare.cells import Cell, Source, cells_of
from fedlora.compare.comparison import comparison
from fedlora.compare.finish import Tell, Where, finish, incomplete, summary_of
from fedlora.compare.table import markdown
from fedlora.compare.tuning import (
    Choice,
    Choices,
    Tuning,
    choose,
    private_runs,
    setting_of,
    trial_epsilons,
    trials_of,
)
from fedlora.config.schema import RunConfig
from fedlora.disk import make_directory, write_durably
from fedlora.errors import ConfigError, IncompleteError
from fedlora.export.intervals import Series, interval_chart, point, standalone
from fedlora.export.words import HIGH_IS_GOOD, score
from fedlora.runs.rundir import STATES, finished_summary, locked


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be compared.

    epsilons: none takes the config's own. own: the user's arms, `name: key=value ...`. against: None, the first method.
    tuning: None takes every arm as it is. where: cells and trials run, and what they amount to lies.
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
    where: Where


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
    make_directory(request.where.directory)
    with locked(request.where.directory):
        return _compared(request, plan, tell)


def _compared(request: Request, plan: _Plan, tell: Tell) -> tuple[dict[str, Any], list[str]]:
    choices, told = _tuned(request, plan, tell)
    cells = _cells(request, plan, choices)
    failures = finish(cells, request.where, tell, "cell")
    shutil.rmtree(request.where.directory / STATES, ignore_errors=True)
    found = comparison(
        plan.arms,
        cells,
        [(cell, summary) for cell in cells if (summary := finished_summary(cell.run_dir)) is not None],
        against=plan.against,
        tuning=told,
        choices=choices,
        control=plan.control,
    )
    _write(found, request.where.directory)
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


def _tuned(request: Request, plan: _Plan, tell: Tell) -> tuple[Choices, dict[str, Any] | None]:
    """What trials chose, and what all trials share. The control has the choices of its twin."""
    tuning = request.tuning
    if tuning is None:
        return {}, None
    epsilons = trial_epsilons(plan.epsilons, tuning)
    twin = plan.control[0] if plan.control else None
    directory = request.where.directory / "trials"
    trials: dict[tuple[str, float | None], list[Cell]] = {}
    for arm in plan.arms:
        if not arm.tuned or arm.name == twin:
            continue
        for epsilon in epsilons or [None]:
            cells = trials_of(request.source, arm, tuning, epsilon, directory)
            trials[arm.name, cells[0].epsilon] = cells  # once, of an arm without privacy
    every = [trial for cells in trials.values() for trial in cells]
    if failures := finish(every, request.where, tell, "trial"):
        raise IncompleteError(incomplete(failures, len(every), "trials", request.where.go_on))
    choices: dict[str, dict[float | None, Choice]] = {}
    for (name, epsilon), cells in trials.items():
        choices.setdefault(name, {})[epsilon] = _choice(cells, tell)
    if plan.control and plan.control[1] in choices:
        choices[plan.control[0]] = choices[plan.control[1]]
    told = {
        "trials": tuning.trials,
        "seeds": tuning.seeds,
        "proxy": None if tuning.proxy is None else str(tuning.proxy),
        "epsilons": epsilons,
        "seed": every[0].seed if every else None,
        "private_runs": private_runs(tuning, plan.config),
    }
    return choices, told


def _choice(trials: Sequence[Cell], tell: Tell) -> Choice:
    summaries = {trial.run_dir: summary_of(trial) for trial in trials}
    metric = str(next(iter(summaries.values()))["metric"])
    scores = {run_dir: summary["score"] for run_dir, summary in summaries.items()}
    choice = choose(trials, scores, high_is_good=HIGH_IS_GOOD[metric])
    norm = "" if choice.best.max_grad_norm is None else f", max_grad_norm {choice.best.max_grad_norm:g}"
    reached = score(metric, dict(choice.tried)[choice.best])
    budget = "" if trials[0].epsilon is None else f" at epsilon {trials[0].epsilon:g}"
    tell(
        f"{trials[0].arm}{budget}: of {len(choice.tried)} trials the best is lr {choice.best.lr:g}{norm} ({reached})"
    )
    return choice


def _cells(request: Request, plan: _Plan, choices: Choices) -> list[Cell]:
    return [
        cell
        for arm in plan.arms
        for cell in cells_of(
            request.source,
            arm,
            epsilons=plan.epsilons,
            seeds=plan.seeds,
            setting=partial(setting_of, choices, arm.name),
            private_runs=private_runs(request.tuning, plan.config) if arm.name in choices else None,
            directory=request.where.directory / "cells",
        )
    ]


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
            values=[point(result["arms"][name], metric) for result in results],
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
