"""The part of the report that shows how long the clients' updates were, beside the noise in them."""

import heapq
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fedlora.export.charts import Beside, line_chart
from fedlora.export.page import figure, folded, table

_SHOWN_CLIENTS = 60
"""Rows of the table; the lengths of all clients are in rounds.jsonl."""


def lengths_by_round(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Median, shortest and longest update of each round, and the same by client; nothing where none is known."""
    told = [line for line in rounds if line.get("update_norm")]
    if not told:
        return ""
    points = [(int(line["round"]), median(line["update_norm"].values())) for line in told]
    spread = [(min(line["update_norm"].values()), max(line["update_norm"].values())) for line in told]
    noise = [
        (int(line["round"]), median(line["noise_norm"].values())) for line in told if line.get("noise_norm")
    ]
    beside = Beside(label="noise alone, expected", points=noise, spread=spread)
    title = f"Length of the median update of a round, {_length(points[-1][1])} in the last one"
    chart = figure(
        lambda width: line_chart(
            points,
            before=None,
            title=title,
            show=_length,
            name="lengths",
            unit="Euclidean norm",
            floor=0.0,
            beside=beside,
            width=width,
        )
    )
    alone = (
        " The dashed line is the length that noise alone is expected to have, in the median." if noise else ""
    )
    text = (
        "The Euclidean norm of what a client sent, over all its numbers: the line is the median client, the bars "
        f"reach from the shortest to the longest.{alone} All of it was released, so it costs no privacy."
    )
    heads = ("Client", "Updates", "Shortest", "Median", "Longest")
    as_table = folded("Client by client", table(heads, _rows(told)))
    return f"<h2>Length of the updates</h2>\n<p>{text}</p>\n{chart}\n{as_table}"


def _rows(told: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Those heard most."""
    by_client: dict[str, list[float]] = {}
    for line in told:
        for client, length in line["update_norm"].items():
            by_client.setdefault(client, []).append(length)
    names = heapq.nsmallest(_SHOWN_CLIENTS, by_client, key=lambda name: (-len(by_client[name]), name))
    return [
        (name, str(len(own)), _length(min(own)), _length(median(own)), _length(max(own)))
        for name, own in ((name, by_client[name]) for name in sorted(names))
    ]


def _length(value: float) -> str:
    return f"{value:.3g}"
