"""The part of the report that shows how the score on public test data went."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedlora.export.charts import line_chart
from fedlora.export.page import figure, folded, table
from fedlora.export.words import epsilon, number, score


def score_over_rounds(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """The curve of the score, that of the loss beside another score, and both as a table; nothing before a score."""
    metric = str(summary["metric"])
    points = [(int(line["round"]), float(line["score"])) for line in rounds if line.get("score") is not None]
    if not points:
        return ""
    before, after = score(metric, summary["score_before"]), score(metric, points[-1][1])
    title = f"Test {metric} over {points[-1][0]} rounds: {before} before training, {after} at the end"
    chart = figure(
        lambda width: line_chart(
            points,
            before=summary["score_before"],
            title=title,
            show=lambda value: score(metric, value),
            unit=metric,
            width=width,
        )
    )
    rows = [
        (
            str(line["round"]),
            score(metric, line.get("score")),
            number(line.get("loss")),
            epsilon(line.get("epsilon_max")),
        )
        for line in rounds
        if line.get("score") is not None
    ]
    as_table = folded("As a table", table(("Round", f"Test {metric}", "Test loss", "Largest epsilon"), rows))
    return f"<h2>Test {escape(metric)}</h2>\n{chart}\n{_loss(metric, rounds)}{as_table}"


def _loss(metric: str, rounds: Sequence[Mapping[str, Any]]) -> str:
    """Of the loss, which moves before an accuracy does; a perplexity is the same curve on another scale."""
    points = [(int(line["round"]), float(line["loss"])) for line in rounds if line.get("loss") is not None]
    if metric != "accuracy" or not points:
        return ""
    title = f"Test loss over {points[-1][0]} rounds, {number(points[-1][1])} at the end"
    chart = figure(
        lambda width: line_chart(
            points,
            before=None,
            title=title,
            show=number,
            name="loss",
            unit="loss, nats a record",
            width=width,
        )
    )
    return f"{chart}\n"
