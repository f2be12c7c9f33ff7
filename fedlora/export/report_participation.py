"""The part of the report that shows who was asked in which round, and what came of it."""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.export.grids import matrix_chart
from fedlora.export.page import figure, folded, table
from fedlora.export.report_clients import some
from fedlora.export.shapes import mark

_SHOWN_CLIENTS = 60
"""Rows of a chart; more could not be read."""
_SHOWN_ROUNDS = 120
"""Columns of a chart, the latest ones."""


def participation_by_client(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """A mark for each client and round, the latest ones; nothing where nobody was asked."""
    shown = latest(rounds)
    names, more = most_asked(summary, shown)
    if not shown or not names:
        return ""
    states = participation(shown)
    title = f"Answers of {len(names)} clients in {len(shown)} rounds"
    note = (
        f"<p>The {len(names)} that were asked most, and {more:,} more in rounds.jsonl.</p>\n" if more else ""
    )
    at = [int(line["round"]) for line in shown]
    chart = figure(lambda width: matrix_chart(names, at, states, title=title, width=width))
    labels = {
        "answered": "answered",
        "refused": "refused",
        "rejected": "rejected",
        "silent": "no answer",
        "not-asked": "not asked",
    }
    used = [state for state in labels if state in states.values() or state in ("answered", "not-asked")]
    keys = "".join(f"<span>{_key(state)}{labels[state]}</span>" for state in used)
    rows = [
        (str(line["round"]), some(line["answered"]), _reasons(line["refused"]), _reasons(line["rejected"]))
        for line in shown
    ]
    as_table = folded("As a table", table(("Round", "Answered", "Refused", "Rejected"), rows))
    return f'<h2>Participation</h2>\n{note}{chart}\n<p class="keys">{keys}</p>\n{as_table}'


def participation(rounds: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], str]:
    """What each asked client did in each round: answered, refused, rejected, or silent."""
    states: dict[tuple[str, int], str] = {}
    for line in rounds:
        index = int(line["round"])
        states |= {(name, index): "silent" for name in line["asked"]}
        states |= {(name, index): "answered" for name in line["answered"]}
        states |= {(name, index): "refused" for name in line["refused"]}
        states |= {(name, index): "rejected" for name in line["rejected"]}
    return states


def _key(state: str) -> str:
    return f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{mark(state, 8, 8, 6)}</svg>'


def latest(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rounds that a chart has room for. Line 0 is the zero-step model: nobody was asked."""
    return [line for line in rounds if line["round"] > 0][-_SHOWN_ROUNDS:]


def most_asked(summary: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> tuple[list[str], int]:
    """The clients that a chart has room for, by name, and how many more there are."""
    asked = Counter(name for name, _ in participation(shown))
    everybody = set(summary["epsilon_by_client"] or ()) | asked.keys()
    names = heapq.nsmallest(_SHOWN_CLIENTS, everybody, key=lambda name: (-asked[name], name))
    return sorted(names), len(everybody) - len(names)


def _reasons(reasons: Mapping[str, str]) -> str:
    return some([f"{name} ({reason})" for name, reason in reasons.items()]) or "-"
