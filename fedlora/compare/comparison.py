"""What finished cells amount to, as one JSON document: equal for equal runs, whatever came between."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from fedlora.compare.arms import Arm
from fedlora.compare.cells import Cell, Setting
from fedlora.compare.statistics import CONFIDENCE, Estimate, estimate, paired
from fedlora.compare.tuning import Choices
from fedlora.export.words import HIGH_IS_GOOD

Finished: TypeAlias = Sequence[tuple[Cell, Mapping[str, Any]]]
"""Cells with their summary.json."""


def comparison(
    arms: Sequence[Arm],
    cells: Sequence[Cell],
    finished: Finished,
    *,
    against: str,
    tuning: Mapping[str, Any] | None,
    choices: Choices,
    control: tuple[str, str] | None,
) -> dict[str, Any]:
    """comparison.json.

    Args:
        arms: in the order of the table.
        cells: all that were to run.
        finished: those that are, with their summaries.
        against: the arm that the others are paired with.
        tuning: what all trials share.
        choices: of those arms that were tuned.
        control: the arm that must not differ, and the one that it must not differ from.
    """
    summaries = {cell.run_dir: summary for cell, summary in finished}
    metrics = {summary["metric"] for summary in summaries.values()}
    metric = metrics.pop() if len(metrics) == 1 else None
    epsilons = sorted({cell.epsilon for cell in cells if cell.epsilon is not None})
    results = [
        {
            "epsilon": epsilon,
            "arms": {arm.name: _of_arm(arm.name, epsilon, against, finished) for arm in arms},
        }
        for epsilon in epsilons or [None]
    ]
    return {
        "finished": len(summaries) == len(cells),
        "metric": metric,
        "high_is_good": HIGH_IS_GOOD.get(str(metric), True),
        "confidence": CONFIDENCE,
        "seeds": sorted({cell.seed for cell in cells}),
        "epsilons": epsilons,
        "delta": max((s["delta"] for s in summaries.values() if s["private"]), default=None),
        "noise_source": next((s["noise_source"] for s in summaries.values() if s["private"]), None),
        "against": against,
        "arms": {arm.name: {"reason": arm.reason, "overrides": list(arm.overrides)} for arm in arms},
        "tuning": None if tuning is None else {**tuning, "arms": _told(choices)},
        "results": results,
        "control": None if control is None else _control(*control, epsilons or [None], finished),
        "cells": [_cell(cell, summaries.get(cell.run_dir)) for cell in cells],
    }


def _of_arm(name: str, epsilon: float | None, against: str, finished: Finished) -> dict[str, Any]:
    """One arm at one budget: mean, interval, paired difference; None where no cell of it is finished."""
    scores, theirs = _scores(name, epsilon, finished), _scores(against, epsilon, finished)
    difference = None if name == against else paired(scores, theirs)
    held = [s for cell, s in finished if cell.arm == name and cell.epsilon in (epsilon, None)]
    spent = [s["epsilon_max"] for s in held if s["private"]]
    tuned = [s["tuning"]["epsilon_max"] for s in held if s["private"] and s["tuning"]["epsilon_max"]]
    found = {
        **_words(estimate(list(scores.values())) if scores else None),
        "scores": {str(seed): score for seed, score in sorted(scores.items())},
        "private": bool(spent) if held else None,
        "epsilon_max": max(spent, default=None),
        "epsilon_max_with_tuning": max(tuned, default=None),
        "paired": None,
    }
    if difference is not None:
        found["paired"] = {
            "against": against,
            **_words(difference),
            "excludes_zero": difference.excludes_zero,
            "seeds": len(scores.keys() & theirs.keys()),
        }
    return found


def _scores(name: str, epsilon: float | None, finished: Finished) -> dict[int, float]:
    """By seed; those of an arm without privacy stand at every epsilon."""
    return {
        cell.seed: summary["score"]
        for cell, summary in finished
        if cell.arm == name and cell.epsilon in (epsilon, None)
    }


def _words(found: Estimate | None) -> dict[str, Any]:
    if found is None:
        return {"mean": None, "interval": None}
    return {"mean": found.mean, "interval": None if found.interval is None else list(found.interval)}


def _control(name: str, of: str, epsilons: Sequence[float | None], finished: Finished) -> dict[str, Any]:
    """Whether the same against the same differs: it does not where every interval holds 0. None: no interval yet."""
    pairs = {e: paired(_scores(name, e, finished), _scores(of, e, finished)) for e in epsilons}
    known = [pair for pair in pairs.values() if pair is not None and pair.interval is not None]
    return {
        "arm": name,
        "of": of,
        "contains_zero": all(not pair.excludes_zero for pair in known) if known else None,
        "paired": [{"epsilon": epsilon, **_words(pair)} for epsilon, pair in pairs.items()],
    }


def _told(choices: Choices) -> dict[str, Any]:
    """By arm, one entry a budget."""
    return {
        name: [
            {
                "epsilon": epsilon,
                "chosen": _setting(choice.best),
                "tried": [{**_setting(setting), "score": score} for setting, score in choice.tried],
            }
            for epsilon, choice in own.items()
        ]
        for name, own in choices.items()
    }


def _setting(setting: Setting) -> dict[str, Any]:
    return {"lr": setting.lr, "max_grad_norm": setting.max_grad_norm}


def _cell(cell: Cell, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    found = {"arm": cell.arm, "epsilon": cell.epsilon, "seed": cell.seed, "run_dir": cell.run_dir.name}
    keys = ("score", "score_before", "epsilon_max", "state_sha256")
    return {**found, **{key: None if summary is None else summary[key] for key in keys}}
