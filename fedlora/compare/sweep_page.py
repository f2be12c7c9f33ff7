"""A sweep as people read it: rows on a terminal, one HTML file that needs nothing else; and CSV for programs."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedlora.export.intervals import Series, interval_chart, point
from fedlora.export.page import figure, page, table
from fedlora.export.statement import NOT_PRIVATE, noise_label
from fedlora.export.words import epsilon as epsilon_text
from fedlora.export.words import score as score_text


def heads_of(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the columns that `rows_of` fills."""
    return (*_short_keys(found), f"test {found['metric']}", "95 % interval", "epsilon spent", "runs")


def rows_of(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a setting, in the order of the grid."""
    return [_row(found, own) for own in found["settings"]]


def heading(found: Mapping[str, Any]) -> str:
    """What was run."""
    seeds, settings = len(found["seeds"]), len(found["settings"])
    return f"{settings} settings, {seeds} seed{'' if seeds == 1 else 's'} each"


def notes(found: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the rows, and what it costs to choose by them."""
    told = [] if found["high_is_good"] else [f"{found['metric']}: lower is better"]
    if len(found["seeds"]) == 1:
        told.append("one seed tells no interval; --seeds 5 does")
    if found["noise_source"] is not None:
        told.append(f"noise: {noise_label(found['noise_source'])}")
    if found["private_runs"]:
        told.append(
            "each epsilon is of a run by itself. Taking the best of these settings by their scores is tuning on the "
            "private records, and what is taken then costs what all runs together spent: declare privacy.tuned_on: "
            f"{{private_runs: {found['private_runs'] + 1}}} in the run that follows, or sweep on public data"
        )
    return told if found["finished"] else [*told, "NOT FINISHED: runs are missing"]


def csv_text(found: Mapping[str, Any]) -> str:
    """One line a run: its settings by their full keys, seed, score, epsilon, digest of the final state, directory."""
    keys = [axis["key"] for axis in found["axes"]]
    columns = ("seed", "score", "score_before", "epsilon_max", "delta", "state_sha256", "run_dir")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*keys, *columns])
    for own in found["settings"]:
        held = [_plain(own["set"][key]) for key in keys]
        writer.writerows([*held, *(run[column] for column in columns)] for run in own["runs"])
    return out.getvalue()


def html_page(found: Mapping[str, Any]) -> str:
    """The table, its chart and its notes."""
    title = f"Sweep over {' and '.join(_short_keys(found))}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(heading(found))}</p>',
        figure(lambda width: _chart(found, width)) if found["metric"] is not None else "",
        table(heads_of(found), rows_of(found)),
        f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes(found))}</ul>",
    ]
    return page(title, body)


def _row(found: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, ...]:
    metric = str(found["metric"])
    between = "-"
    if own["interval"] is not None:
        between = f"{score_text(metric, own['interval'][0])} to {score_text(metric, own['interval'][1])}"
    spent = epsilon_text(own["epsilon_max"]) if own["private"] else NOT_PRIVATE
    done = sum(run["score"] is not None for run in own["runs"])
    held = (_plain(value) for value in own["set"].values())
    return (*held, score_text(metric, own["mean"]), between, spent, f"{done} of {len(own['runs'])}")


def _chart(found: Mapping[str, Any], width: float) -> str:
    """Columns for the values of the first key, a series for each combination of the others."""
    metric, first = str(found["metric"]), found["axes"][0]
    columns = [_plain(value) for value in first["values"]]
    each = len(found["settings"]) // len(columns)
    series = []
    for place in range(each):
        rows = found["settings"][place::each]
        others = list(rows[0]["set"].items())[1:]
        name = ", ".join(f"{key.rpartition('.')[2]} {_plain(value)}" for key, value in others) or metric
        series.append(Series(name=name, values=[point(row, metric) for row in rows]))
    return interval_chart(
        columns,
        series,
        title=f"Test {metric} by {first['key']}, means and 95 % intervals",
        across=first["key"],
        show=lambda value: score_text(metric, value),
        width=width,
    )


def _short_keys(found: Mapping[str, Any]) -> list[str]:
    """Each key's last word, or all of it where two end alike."""
    keys: Sequence[str] = [axis["key"] for axis in found["axes"]]
    last = Counter(key.rpartition(".")[2] for key in keys)
    return [key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2] for key in keys]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
