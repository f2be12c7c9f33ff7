"""What commands print: text for people or one JSON document for programs; nothing else reaches stdout."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import typer

from fedlora.cli.run_dir import config_named, run_dir_named


class Format(StrEnum):
    """How a command prints what it found."""

    TEXT = "text"
    JSON = "json"


FormatOption: TypeAlias = Annotated[
    Format, typer.Option("--format", help="One JSON document, or text.", show_default=False)
]
SetOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the config; repeatable."),
]
ConfigArgument: TypeAlias = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="A run's YAML file, or init's directory.", callback=config_named),
]
RunDirArgument: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR",
        help="What simulate left behind, or the config that it ran.",
        callback=run_dir_named,
    ),
]


@contextlib.contextmanager
def only_ours() -> Iterator[None]:
    """Whatever libraries print meanwhile goes to stderr, so that stdout stays one document."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(value: Any, text: str, form: Format) -> None:
    """Prints `value` as JSON or `text` as it is."""
    print(json.dumps(value, indent=2) if form is Format.JSON else text)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns, without trailing blanks."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}".rstrip() for name, value in rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their heads: the first to the left, figures to the right."""
    lines = [list(heads), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  "
        + "  ".join(
            [line[0].ljust(widths[0]), *[cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]]
        )
        for line in lines
    )


MOST_ROWS = 20
"""Of a table with a row for each client; a run may have 100,000."""


Row = TypeVar("Row")


def telling(rows: Sequence[Row], first: Callable[[Row], Any]) -> Sequence[Row]:
    """The rows as they are, or, where `first_rows` would cut some off, sorted by what is to come first."""
    return rows if len(rows) <= MOST_ROWS else sorted(rows, key=first)


def first_rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table of the first rows, and how many more there are."""
    more = len(rows) - MOST_ROWS
    note = f"\n  and {more:,} more: --format json has them all" if more > 0 else ""
    return table(heads, rows[:MOST_ROWS]) + note


def summary_text(summary: Mapping[str, Any], run_dir: Path) -> str:
    """The final table of a run."""
    from fedlora.config.method import title_of
    from fedlora.export.statement import headline
    from fedlora.export.words import duration, nothing_learnt, score

    metric = str(summary["metric"])
    before, after = score(metric, summary["score_before"]), score(metric, summary["score"])
    rows = [
        ("method", title_of(summary["method"])),
        (f"test {metric}", f"{before} before, {after} after"),
        *([] if (learnt := nothing_learnt(summary)) is None else [("learnt", learnt)]),
        *(_personal(metric, summary) if summary.get("personal") else []),
        ("privacy", headline(summary)),
        *(_terms(summary) if summary["private"] else []),
        ("rounds", f"{summary['rounds_completed']} with {summary['clients']} clients{_absent(summary)}"),
        ("time", f"{duration(summary['seconds'])} in rounds, without loading, calibrating and writing"),
        ("adapter", str(run_dir / "adapter")),
        ("report", str(run_dir / "report.html")),
    ]
    return pairs(rows)


def _absent(summary: Mapping[str, Any]) -> str:
    """How many clients never answered, and who they were if they are few."""
    absent = [client for client, times in summary["participations"].items() if not times]
    if not absent:
        return ""
    named = f": {', '.join(absent)}" if len(absent) <= 3 else ""
    return f", of which {len(absent):,} never took part{named}"


def _personal(metric: str, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How clients' own models do, where each keeps its B."""
    from fedlora.export.words import score

    scores = summary["personal"].values()
    least, most = score(metric, min(scores)), score(metric, max(scores))
    mean = score(metric, summary["personal_mean"])
    return [
        ("personal models", f"{mean} in the mean of {len(scores)}, {least} to {most}, on the same records")
    ]


def _terms(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the headline's epsilon means; all of it is in the report."""
    from fedlora.export.statement import noise_label, tuning_text, unit_text
    from fedlora.export.words import epsilon

    replace_one = epsilon(summary["epsilon_replace_one_max"])
    return [
        ("unit", f"{unit_text(summary['unit'])}, {summary['adjacency']}; replace-one epsilon {replace_one}"),
        ("noise", noise_label(summary["noise_source"])),
        ("tuning", tuning_text(summary["tuning"])),
    ]
