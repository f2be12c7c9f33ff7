"""A comparison as people read it: on a terminal, and as Markdown for documents."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.export.statement import NOT_PRIVATE, noise_label
from fedlora.export.words import epsilon as epsilon_text
from fedlora.export.words import number
from fedlora.export.words import score as score_text

HEADS = ("arm", "mean", "95 % interval", "difference", "95 % interval", "", "epsilon spent", "lr, clip")
MARK = "*"
"""Beside a difference whose interval excludes zero."""


def rows_of(result: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row an arm, under HEADS. result: of one epsilon; found: the whole comparison."""
    return [_row(name, arm, found, result["epsilon"]) for name, arm in result["arms"].items()]


def heading(result: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What the rows of one epsilon have in common."""
    budget = NOT_PRIVATE if result["epsilon"] is None else f"epsilon {result['epsilon']:g}"
    delta = "" if found["delta"] is None else f" at delta {number(found['delta'])}"
    seeds = len(found["seeds"])
    return f"{budget}{delta}, test {found['metric']}, {seeds} seed{'' if seeds == 1 else 's'}"


def notes(found: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the rows: signs, tuning and its cost, the control."""
    against, better = found["against"], "" if found["high_is_good"] else "; lower is better"
    told = [
        f"differences are paired by seed, each arm minus {against}{better}; {MARK}: their interval excludes 0"
    ]
    if len(found["seeds"]) == 1:
        told.append("one seed tells no interval; --seeds 5 does")
    if found["noise_source"] is not None:
        told.append(f"noise: {noise_label(found['noise_source'])}")
    if found["tuning"] is None:
        told.append("tuning: none; every arm has the config's learning rate and clipping, or its own")
    else:
        told.append(tuning_text(found["tuning"]))
    if found["control"] is not None:
        told.append(control_text(found["control"]))
    told.append(
        "taking the best of these arms by scores on private data is tuning too: declare privacy.tuned_on"
    )
    return told if found["finished"] else [*told, "NOT FINISHED: cells are missing"]


def tuning_text(tuning: Mapping[str, Any]) -> str:
    """The budget of the search, and what it cost."""
    budgets = ", ".join(f"{epsilon:g}" for epsilon in tuning["epsilons"])
    each = "each of epsilon " if len(tuning["epsilons"]) > 1 else "epsilon "
    budget = f"at {each}{budgets}" if budgets else "without privacy"
    arms = ", ".join(tuning["arms"])
    several = tuning["seeds"] > 1
    seeds = (
        f"seeds {tuning['seed']} to {tuning['seed'] + tuning['seeds'] - 1}"
        if several
        else f"seed {tuning['seed']}"
    )
    done = f"tuning: {tuning['trials']} trials each of {arms}, {budget}, {seeds}"
    if tuning["proxy"] is not None:
        return f"{done}, on {tuning['proxy']}; no privacy cost to this data"
    if tuning["private_runs"] is None:
        return f"{done}, on this data, {NOT_PRIVATE}"
    runs = tuning["private_runs"]
    return f"{done}, on this data; `with tuning`: what {runs} runs like the cell spent on the same records"


def control_text(control: Mapping[str, Any]) -> str:
    """Whether an arm differs from itself."""
    pair = f"control: {control['arm']} against {control['of']}"
    match control["contains_zero"]:
        case None:
            return f"{pair}: no interval, two seeds are needed"
        case True:
            return f"{pair}: every interval contains 0, as it must"
        case _:
            return (
                f"{pair}: an interval EXCLUDES 0. One in twenty does by chance; if it stays with more seeds, trust "
                "no difference here"
            )


def markdown(found: Mapping[str, Any]) -> str:
    """The tables and their notes."""
    parts = []
    for result in found["results"]:
        rows = [HEADS, tuple("---" for _ in HEADS), *rows_of(result, found)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join([f"**{heading(result, found)}**", "", *lines]))
    parts.append("\n".join(f"- {note}" for note in notes(found)))
    return "\n\n".join(parts) + "\n"


def _row(
    name: str, arm: Mapping[str, Any], found: Mapping[str, Any], epsilon: float | None
) -> tuple[str, ...]:
    metric, pair = str(found["metric"]), arm["paired"]
    return (
        name,
        score_text(metric, arm["mean"]),
        _between(metric, arm["interval"], sign=""),
        "-" if pair is None else _number(metric, pair["mean"], "+"),
        "-" if pair is None else _between(metric, pair["interval"], sign="+"),
        MARK if pair is not None and pair["excludes_zero"] else "",
        _spent(arm),
        _settings(name, found, epsilon),
    )


def _spent(arm: Mapping[str, Any]) -> str:
    if arm["private"] is None:
        return "-"
    if not arm["private"]:
        return NOT_PRIVATE
    told = epsilon_text(arm["epsilon_max"])
    with_tuning = arm["epsilon_max_with_tuning"]
    return told if with_tuning is None else f"{told}, with tuning {epsilon_text(with_tuning)}"


def _settings(name: str, found: Mapping[str, Any], epsilon: float | None) -> str:
    """What tuning chose for this budget, or for the one that it looked at; a dash for an arm that has its own."""
    choices = (found["tuning"] or {"arms": {}})["arms"].get(name)
    if not choices:
        return "-"
    chosen = next((c for c in choices if c["epsilon"] == epsilon), choices[0])["chosen"]
    return ", ".join(number(value) for value in (chosen["lr"], chosen["max_grad_norm"]) if value is not None)


def _between(metric: str, interval: Sequence[float] | None, *, sign: str) -> str:
    if interval is None:
        return "-"
    return f"{_number(metric, interval[0], sign)} to {_number(metric, interval[1], sign)}"


def _number(metric: str, value: float, sign: str) -> str:
    """Accuracies in points of a hundred; sign: `+` writes it before what is not negative too."""
    return f"{100 * value:{sign}.1f}" if metric == "accuracy" else f"{value:{sign}.4g}"
