"""The parts of the report that tell one client from another: epsilon, participation, what they told."""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.export.charts import bar_chart, line_chart, mark, matrix_chart
from fedlora.export.page import folded, table
from fedlora.export.words import epsilon

_SHOWN_CLIENTS = 60
"""Rows of a chart; more could not be read. The figures of all clients are in summary.json."""
MOST_ROWS = 20
"""Of a table in a text that people read."""
_SHOWN_ROUNDS = 120
"""Columns of the participation chart, the latest ones."""


def epsilon_by_client(summary: Mapping[str, Any], target: float | None) -> str:
    """A bar and a table row for each client; nothing where privacy is off."""
    if not summary["private"] or not summary["epsilon_by_client"]:
        return ""
    spent = summary["epsilon_by_client"]
    most = sorted((name, spent[name]) for name in dearest(summary, _SHOWN_CLIENTS))
    title = f"epsilon of {len(most)} clients; the largest is {epsilon(summary['epsilon_max'])}"
    chart = bar_chart(most, limit=target, title=title, show=epsilon)
    note = (
        f"The {len(most)} largest of {len(spent):,}; all are in summary.json."
        if len(most) < len(spent)
        else ""
    )
    rows = client_rows(summary, [name for name, _ in most])
    text = (
        "Spent by a client on each of its records, over all it released. Each participation is paid for before it "
        "begins, so also one that left no reply."
    )
    figure = f"<figure>\n{chart}\n</figure>"
    return f"<h2>epsilon by client</h2>\n<p>{text} {note}</p>\n{figure}\n{table(CLIENT_HEADS, rows)}"


def dearest(summary: Mapping[str, Any], most: int) -> list[str]:
    """The clients that spent most, at most so many; of equals those that answered more rounds, then by name."""
    spent, done = summary["epsilon_by_client"], summary["participations"]
    return heapq.nsmallest(most, spent, key=lambda client: (-spent[client], -done.get(client, 0), client))


CLIENT_HEADS = ("Client", "Rounds answered", "Participations paid", "epsilon", "Replace-one epsilon")


def client_rows(summary: Mapping[str, Any], clients: Sequence[str]) -> list[tuple[str, ...]]:
    """What each of these clients did and spent, under CLIENT_HEADS; a dash for what is not known yet."""
    replace_one = summary["epsilon_replace_one_by_client"] or {}
    return [
        (
            client,
            str(summary["participations"].get(client, 0)),
            str(summary["debits_by_client"].get(client, 0)),
            epsilon(summary["epsilon_by_client"][client]),
            epsilon(replace_one.get(client)),
        )
        for client in clients
    ]


def accuracy_told(rounds: Sequence[Mapping[str, Any]]) -> str:
    """The mean of what clients told of their own records in each round; nothing where they told nothing."""
    told = [(int(line["round"]), line["accuracy_told"]) for line in rounds if line.get("accuracy_told")]
    if not told:
        return ""
    points = [(index, sum(values.values()) / len(values)) for index, values in told]
    heading = "Accuracy on the clients' own records, as told with noise"

    def show(value: float) -> str:
        return f"{100 * value:.1f} %"

    chart = line_chart(points, before=None, title=heading, show=show, name="told")
    rows = [
        (
            str(index),
            show(mean),
            _names([f"{client} {show(value)}" for client, value in sorted(values.items())]),
        )
        for (index, mean), (_, values) in zip(points, told, strict=True)
    ]
    text = (
        "Of the model that was sent in each round, averaged over the clients that told it. Each figure carries "
        "noise that the client's budget pays for, so it may lie below 0 or above 100 %."
    )
    as_table = folded("As a table", table(("Round", "Mean", "Told"), rows))
    return f"<h2>{heading}</h2>\n<p>{text}</p>\n<figure>\n{chart}\n</figure>\n{as_table}"


def participation_by_client(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """A mark for each client and round, the latest ones; nothing where nobody was asked."""
    # Line 0 is the zero-step model: nobody was asked.
    shown = [line for line in rounds if line["round"] > 0][-_SHOWN_ROUNDS:]
    states = participation(shown)
    asked = Counter(name for name, _ in states)
    everybody = set(summary["epsilon_by_client"] or ()) | asked.keys()
    names = sorted(heapq.nsmallest(_SHOWN_CLIENTS, everybody, key=lambda name: (-asked[name], name)))
    if not shown or not names:
        return ""
    title = f"Answers of {len(names)} clients in {len(shown)} rounds"
    more = len(everybody) - len(names)
    note = (
        f"<p>The {len(names)} that were asked most, and {more:,} more in rounds.jsonl.</p>\n" if more else ""
    )
    chart = matrix_chart(names, [int(line["round"]) for line in shown], states, title=title)
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
        (str(line["round"]), _names(line["answered"]), _reasons(line["refused"]), _reasons(line["rejected"]))
        for line in shown
    ]
    as_table = folded("As a table", table(("Round", "Answered", "Refused", "Rejected"), rows))
    return (
        f'<h2>Participation</h2>\n{note}<figure>\n{chart}\n</figure>\n<p class="keys">{keys}</p>\n{as_table}'
    )


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


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])} and {len(names) - 20} more"


def _reasons(reasons: Mapping[str, str]) -> str:
    return _names([f"{name} ({reason})" for name, reason in reasons.items()]) or "-"
