"""The parts of the report that tell one client from another: epsilon and what they told."""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.export.charts import bar_chart, line_chart
from fedlora.export.page import figure, folded, table
from fedlora.export.words import epsilon

_SHOWN_CLIENTS = 60
"""Rows of a chart; more could not be read. The figures of all clients are in summary.json."""
MOST_ROWS = 20
"""Of a table in a text that people read."""


def epsilon_by_client(summary: Mapping[str, Any], target: float | None) -> str:
    """A bar and a table row for each client; nothing where privacy is off."""
    if not summary["private"] or not summary["epsilon_by_client"]:
        return ""
    spent = summary["epsilon_by_client"]
    most = sorted((name, spent[name]) for name in dearest(summary, _SHOWN_CLIENTS))
    title = f"epsilon of {len(most)} clients; the largest is {epsilon(summary['epsilon_max'])}"
    chart = figure(
        lambda width: bar_chart(most, limit=target, title=title, unit="epsilon", show=epsilon, width=width)
    )
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
    return f"<h2>Epsilon by client</h2>\n<p>{text} {note}</p>\n{chart}\n{table(CLIENT_HEADS, rows)}"


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

    chart = figure(
        lambda width: line_chart(
            points, before=None, title=heading, show=show, name="told", unit="accuracy", width=width
        )
    )
    rows = [
        (
            str(index),
            show(mean),
            some([f"{client} {show(value)}" for client, value in sorted(values.items())]),
        )
        for (index, mean), (_, values) in zip(points, told, strict=True)
    ]
    text = (
        "Of the model that was sent in each round, averaged over the clients that told it. Each figure carries "
        "noise that the client's budget pays for, so it may lie below 0 or above 100 %."
    )
    as_table = folded("As a table", table(("Round", "Mean", "Told"), rows))
    return f"<h2>{heading}</h2>\n<p>{text}</p>\n{chart}\n{as_table}"


def some(names: Sequence[str]) -> str:
    """The first twenty, and how many more there are."""
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])} and {len(names) - 20} more"
