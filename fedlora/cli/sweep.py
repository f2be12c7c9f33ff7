"""The command that varies: one config, a grid of settings, one table."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.cli.many_runs import WorkersOption, require_none, to_option, told, where_of
from fedlora.cli.output import ConfigArgument, Format, FormatOption, SetOption, show, table


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("sweep", short_help="Run a grid of settings; one table at the end.")(sweep)


def sweep(
    config: ConfigArgument,
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            metavar="KEY=V,V,...",
            help="One key of the config and its values, or a YAML file of `KEY: [V, V]` lines; repeatable, all "
            "combinations are run.",
        ),
    ],
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Runs of each setting, from the config's seed upwards.")
    ] = 1,
    overrides: SetOption = None,
    directory: Annotated[Path | None, to_option("sweep")] = None,
    workers: WorkersOption = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Run every combination of a grid, side by side on Ray; table, CSV and HTML. Interrupted, it goes on."""
    from fedlora.compare.cells import Source
    from fedlora.compare.sweep import Sweep
    from fedlora.compare.sweep import sweep as work

    source = Source(path=config, overrides=tuple(overrides or ()))
    where = where_of(source, directory, workers, "sweep")
    request = Sweep(source=source, grids=grid, seeds=seeds, where=where)
    found, failures = told(partial(work, request), where)
    show(found, _text(found, where.directory), form)
    require_none(failures, len(found["settings"]) * seeds, "runs", where)


def _text(found: Mapping[str, Any], directory: Path) -> str:
    from fedlora.compare.sweep_page import heading, heads_of, notes, rows_of

    rows = "\n".join(line.rstrip() for line in table(heads_of(found), rows_of(found)).splitlines())
    files = ", ".join(f"sweep.{kind}" for kind in ("json", "csv", "html"))
    return "\n".join(
        [heading(found), rows, "", *(f"  {note}" for note in notes(found)), f"  {directory}: {files}, runs/"]
    )
