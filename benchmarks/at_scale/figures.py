"""From times to figures: rounds, client-rounds per second, what a round costs beside its jobs, goals met or missed."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from at_scale.cases import ACTORS, ARMS, FLOWER, GHOST, OURS, Case

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure that one or several cases give, and what it must reach.

    at_least: False where `goal` is what it may reach at most. chief: the one that is said last.
    """

    name: str
    value: float
    goal: float
    at_least: bool = True
    chief: bool = False

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{self.name}: {self.value:.3g} (goal {bound} {self.goal:g}){'' if self.met else ' MISSED'}"


def measured(row: dict[str, Any], case: Case) -> dict[str, Any]:
    """The row with what follows from its stamps; the first round, in which actors load, counts as start-up.

    round_s: of each later round. start_s: of the process, to the end of the first round, less one later round.
    job_s: of one client in its host, with its ledger. busy: share of the actors' time in such work. overhead_ms: what
    is left of the round beside it, for each client; of null clients, the whole of it.
    incomplete: rounds in which not everybody answered.
    """
    if "failed" in row:
        return row
    stamps, spans = row["stamps"], row["spans"]
    rounds = list(pairwise(stamps[1:]))
    seconds = [end - begin for begin, end in rounds]
    usual = statistics.median(seconds)
    found = {
        **{key: value for key, value in row.items() if key not in ("stamps", "spans", "began")},
        "round_s": seconds,
        "whole_s": stamps[-1] - row["began"],
        "start_s": stamps[1] - row["began"] - usual,
        "incomplete": sum(1 for count in row["answered"] if count != case.asked),
    }
    if case.null:
        found["overhead_ms"] = 1e3 * usual / case.asked
    elif spans:
        worked = [sum(_within(held, begin, end) for held in spans) for begin, end in rounds]
        shares = [work / ACTORS / span for work, span in zip(worked, seconds, strict=True)]
        rest = [span - work / ACTORS for work, span in zip(worked, seconds, strict=True)]
        found |= {
            "job_s": statistics.median(worked) / case.asked,
            "busy": statistics.median(shares),
            "overhead_ms": 1e3 * statistics.median(rest) / case.asked,
        }
    return found


def _within(spans: Iterable[Sequence[float]], begin: float, end: float) -> float:
    """Seconds of [begin, end] that at least one span covers."""
    covered, reached = 0.0, begin
    for first, last in sorted((max(first, begin), min(last, end)) for first, last in spans):
        covered += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    return covered


def pooled(rows: Rows, case: str, arm: str) -> dict[str, Any] | None:
    """Medians over the repeats of an arm; None where none came to its end."""
    held = [row for row in rows if (row["case"], row["arm"]) == (case, arm) and "failed" not in row]
    if not held:
        return None
    keys = ("whole_s", "start_s", "driver_mb", "actors_mb", "ray_mb", "job_s", "busy", "overhead_ms")
    return {
        "round_s": statistics.median(statistics.median(row["round_s"]) for row in held),
        "incomplete": sum(row["incomplete"] for row in held),
        **{key: statistics.median(row[key] for row in held) for key in keys if key in held[0]},
    }


def ratio(rows: Rows, case: str, peer: str) -> float | None:
    """How many times the peer's client-rounds per second ours are: the median over repeats, each beside the other.

    Of a peer that was not done in its time, a lower bound, start-up in it; NaN where one broke; None: not run.
    """
    ours, theirs = (_medians(rows, case, arm) for arm in (OURS, peer))
    both = sorted(ours.keys() & theirs.keys())
    if both:
        return statistics.median(theirs[repeat] / ours[repeat] for repeat in both)
    ours_s, theirs_s = (_whole(rows, case, arm) for arm in (OURS, peer))
    return statistics.median(theirs_s) / statistics.median(ours_s) if ours_s and theirs_s else None


def _whole(rows: Rows, case: str, arm: str) -> list[float]:
    held = [row for row in rows if (row["case"], row["arm"]) == (case, arm)]
    return [row.get("whole_s") or math.nan for row in held]


def _medians(rows: Rows, case: str, arm: str) -> dict[int, float]:
    held = [row for row in rows if (row["case"], row["arm"]) == (case, arm) and "failed" not in row]
    return {row["repeat"]: statistics.median(row["round_s"]) for row in held}


def goals(rows: Rows, cases: Sequence[Case]) -> list[Goal]:
    """What the rows say of every goal that they touch; the chief one last."""
    found = [*_speed(rows, cases), *_real(rows, cases), *_costs(rows, cases), *_memory(rows, cases)]
    return sorted(found, key=lambda goal: goal.chief)


def _speed(rows: Rows, cases: Sequence[Case]) -> Iterable[Goal]:
    for case in cases:
        if case.model == "tiny" and (times := ratio(rows, case.name, FLOWER)) is not None:
            chief = case.asked == 1000 and case.megabytes == 3.0
            name = f"{case.name}: times the client-rounds per second of stock Flower"
            yield Goal(name=name, value=times, goal=10.0 if chief else 1.0, chief=chief)


def _real(rows: Rows, cases: Sequence[Case]) -> Iterable[Goal]:
    for case in (case for case in cases if case.model == "minilm" and case.batch_size == 2):
        for peer, least in ((FLOWER, 1.7), (GHOST, 8.0)):
            if (times := ratio(rows, case.name, peer)) is not None:
                yield Goal(name=f"{case.name}: times {peer}", value=times, goal=least)


def _costs(rows: Rows, cases: Sequence[Case]) -> Iterable[Goal]:
    for case in cases:
        found = pooled(rows, case.name, OURS)
        if found is None:
            continue
        if case.null and case.megabytes < 0.1:
            yield Goal(
                name=f"{case.name}: overhead of a client-round, ms",
                value=found["overhead_ms"],
                goal=1.0,
                at_least=False,
            )
        if case.model == "minilm" and "busy" in found:
            yield Goal(name=f"{case.name}: busy share of the actors", value=found["busy"], goal=0.9)


def _memory(rows: Rows, cases: Sequence[Case]) -> Iterable[Goal]:
    stale = {case.clients: pooled(rows, case.name, OURS) for case in cases if case.beta > 0}
    few, many = stale.get(1_000), stale.get(100_000)
    if few and many:
        name = "driver memory at 100,000 clients, times that at 1,000"
        yield Goal(name=name, value=many["driver_mb"] / few["driver_mb"], goal=1.2, at_least=False)
    if many:
        minutes = many["whole_s"] / 60
        yield Goal(
            name="FedStale, 20 rounds of 200 of 100,000 clients, minutes",
            value=minutes,
            goal=10.0,
            at_least=False,
        )


_COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any], Case], str]], ...] = (
    ("round_s", "s a round", lambda found, case: f"{found['round_s']:.3g}"),
    ("round_s", "client-rounds/s", lambda found, case: f"{case.asked / found['round_s']:.3g}"),
    ("start_s", "start-up s", lambda found, case: f"{found['start_s']:.0f}"),
    ("driver_mb", "driver MB", lambda found, case: f"{found['driver_mb']:,.0f}"),
    ("actors_mb", "actors MB", lambda found, case: f"{found['actors_mb']:,.0f}"),
    ("ray_mb", "Ray MB", lambda found, case: f"{found['ray_mb']:,.0f}"),
    ("busy", "busy", lambda found, case: f"{found['busy']:.0%}"),
    ("overhead_ms", "overhead ms", lambda found, case: f"{found['overhead_ms']:.2f}"),
)


def table(rows: Rows, cases: Sequence[Case]) -> str:
    """Every case and arm that was run, as Markdown."""
    heads = ["case", "arm", *(head for _, head, _ in _COLUMNS), "ours / it"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for case in cases:
        for arm in ARMS:
            if any((row["case"], row["arm"]) == (case.name, arm) for row in rows):
                lines.append([case.name, arm, *_cells(rows, case, arm)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(rows: Rows, case: Case, arm: str) -> list[str]:
    found = pooled(rows, case.name, arm)
    if found is None:
        why = next(row["failed"] for row in rows if (row["case"], row["arm"]) == (case.name, arm))
        return [why, *[""] * len(_COLUMNS)]
    cells = [write(found, case) if key in found else "" for key, _, write in _COLUMNS]
    if found["incomplete"]:
        cells[0] += f" ({found['incomplete']} rounds incomplete)"
    times = ratio(rows, case.name, arm) if arm != OURS else None
    return [*cells, f"{times:.2f}" if times is not None else ""]
