"""From times and peaks to ratios, quartiles, goals met or missed, and a table."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from at_scale.figures import Goal

from steps.arms import GHOST, HOOKS, PEFT, ours, plain

Row = dict[str, Any]
Rows = Sequence[Row]


def ratios(rows: Rows, arm: str, beside: str) -> list[float]:
    """The arm's time over the other's, in each repeat; of rows of one problem on one device. Empty: not both ran."""
    times = {row["arm"]: row["seconds"] for row in rows if "seconds" in row}
    if arm not in times or beside not in times:
        return []
    return [a / b for a, b in zip(times[arm], times[beside], strict=True)]


def milliseconds(seconds: float) -> str:
    """Three digits of them, written out."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def by_problem(rows: Rows) -> dict[tuple[str, str], list[Row]]:
    """Rows of (device, problem), in the order in which they came."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["device"], row["problem"]["name"]), []).append(row)
    return found


def goals(rows: Rows) -> list[Goal]:
    """Every goal that the rows say something of."""
    return [
        goal
        for held in by_problem(rows).values()
        if held[0]["problem"]["judged"]
        for kernels in held[0]["kernels"]
        for goal in (*_times(held, kernels), *_peaks(held, kernels))
    ]


def line(goal: Goal) -> str:
    """A goal in words, with a digit more than it has itself: these ratios are near 1."""
    bound = "at least" if goal.at_least else "at most"
    return f"{goal.name}: {goal.value:.3f} (goal {bound} {goal.goal:.2f}){'' if goal.met else ' MISSED'}"


def _times(rows: list[Row], kernels: str) -> Iterable[Goal]:
    gpu = rows[0]["problem"]["device"] == "cuda"
    mine = ours(kernels)
    wanted = [(mine, plain(kernels), 1.03, False), (GHOST, mine, 2.0 if gpu else 1.5, True)]
    if not gpu:
        wanted += [(mine, PEFT, 1.0, False), (HOOKS, mine, 1.0, True)]
    for arm, beside, goal, at_least in wanted:
        if found := ratios(rows, arm, beside):
            name = f"{rows[0]['problem']['name']}: {arm} / {beside}"
            yield Goal(name=name, value=statistics.median(found), goal=goal, at_least=at_least)


def _peaks(rows: list[Row], kernels: str) -> Iterable[Goal]:
    held = {row["arm"]: row for row in rows}
    mine, other = held.get(ours(kernels), {}), held.get(plain(kernels), {})
    limit = 1.02 if rows[0]["problem"]["device"] == "cuda" else 1.0
    for key, words in (("step_mb", "peak memory"), ("checkpointed_mb", "peak memory, checkpointed")):
        if key in mine and key in other:
            name = f"{rows[0]['problem']['name']}: {words}, {mine['arm']} / {other['arm']}"
            value = round(mine[key] / other[key], 2)  # pages and arenas move the third decimal
            yield Goal(name=name, value=value, goal=limit, at_least=False)


def table(rows: Rows) -> str:
    """Every arm of every problem, as Markdown, under the name of its device; quartiles in brackets."""
    found, device = [], None
    for (name, problem), held in by_problem(rows).items():
        if name != device:
            device = name
            found += [f"\n{device}", ""]
        found += [*_problem(problem, held), ""]
    return "\n".join(found).strip()


def _problem(name: str, rows: list[Row]) -> list[str]:
    beside = [PEFT, *(plain(kernels) for kernels in rows[0]["kernels"])]
    heads = [
        name, "ms a step", *(f"/ {arm}" for arm in beside), "of peak rate", "peak MB", "checkpointed MB",
        "before MB",
    ]  # fmt: skip
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        lines.append([row["arm"], *_times_of(row, rows, beside), *_memory_of(row)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _times_of(row: Row, rows: list[Row], beside: list[str]) -> list[str]:
    if "seconds" not in row:
        return [row["failed"], *[""] * (len(beside) + 1)]
    middle = statistics.median(row["seconds"])
    cells = [_with_quartiles(ratios(rows, row["arm"], arm)) if row["arm"] != arm else "1" for arm in beside]
    return [milliseconds(middle), *cells, f"{row['flops'] / middle / row['rate']:.0%}"]


def _with_quartiles(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


def _memory_of(row: Row) -> list[str]:
    wanted = ("step_mb", "checkpointed_mb", "resident_mb")
    return [f"{row[key]:,.0f}" if key in row else row.get(f"{key}_failed", "") for key in wanted]
