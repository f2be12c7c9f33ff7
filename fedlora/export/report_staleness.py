"""The part of the report that shows how old what the server last heard of each client is."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.export.grids import AGES, age_chart, age_mark
from fedlora.export.page import figure, folded, table
from fedlora.export.report_participation import latest, most_asked


def staleness_by_client(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """A square for each client and round; a sentence where all were heard in all; nothing where nobody was asked."""
    shown = latest(rounds)
    names, more = most_asked(summary, shown)
    if not shown or not names:
        return ""
    known = ages(rounds)
    at = [int(line["round"]) for line in shown]
    if more == 0 and all(known.get((name, index)) == 0 for name in names for index in at):
        return "<h2>Staleness</h2>\n<p>Every client was heard in every round: nothing here is older than a round.</p>"
    text = (
        "How many rounds ago an update of each client last counted. What the server knows of a client is as old as "
        "this, whether its method remembers it or not; a late update counts in the round in which it came."
    )
    note = f" The same {len(names)} clients as above, of {len(names) + more:,}." if more else ""
    title = f"Rounds since {len(names)} clients were last heard, in {len(shown)} rounds"
    chart = figure(lambda width: age_chart(names, at, known, title=title, width=width))
    heads = ("Client", "Last heard in round", "Rounds ago at the end", "Longest gap, rounds")
    as_table = folded("As a table", table(heads, [_row(name, at, known) for name in names]))
    return f'<h2>Staleness</h2>\n<p>{text}{note}</p>\n{chart}\n<p class="keys">{_keys()}</p>\n{as_table}'


def ages(rounds: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], int]:
    """By client and round, how many rounds ago the client was last heard; no entry: never until then.

    Args:
        rounds: as in rounds.jsonl, oldest first.
    """
    last: dict[str, int] = {}
    found: dict[tuple[str, int], int] = {}
    for line in rounds:
        index = int(line["round"])
        last |= dict.fromkeys(line["answered"], index)
        found |= {(name, index): index - heard for name, heard in last.items()}
    return found


def _row(name: str, at: Sequence[int], known: Mapping[tuple[str, int], int]) -> tuple[str, ...]:
    own = [age for index in at if (age := known.get((name, index))) is not None]
    if not own:
        return name, "never", "-", "-"
    return name, str(at[-1] - own[-1]), str(own[-1]), str(max(own))


def _keys() -> str:
    ends = [*(after - 1 for after in AGES[1:]), None]
    labels = [_span(first, end) for first, end in zip(AGES, ends, strict=True)]
    marks = [*zip(AGES, labels, strict=True), (None, "never")]
    return "".join(f"<span>{_key(age)}{label}</span>" for age, label in marks)


def _span(first: int, end: int | None) -> str:
    if end is None:
        return f"{first} or more rounds ago"
    if first == 0:
        return "in this round"
    return str(first) if first == end else f"{first} to {end}"


def _key(age: int | None) -> str:
    return f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{age_mark(age, 8, 8, 7)}</svg>'
