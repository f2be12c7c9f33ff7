"""The command that varies: one config, a grid of settings, one table."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.cli.output import ConfigArgument, Format, FormatOption, SetOption, show, table
from fedlora.errors import IncompleteError


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
    directory: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="[default: the config's `output` and -sweep]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Runs at a time. [default: one a core]")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Run every combination of a grid, side by side on Ray; table, CSV and HTML. Interrupted, it goes on."""
    from fedlora.cli.run_dir import many_runs
    from fedlora.compare.cells import Source
    from fedlora.compare.finish import Where, incomplete
    from fedlora.compare.sweep import Sweep
    from fedlora.compare.sweep import sweep as work

    source = Source(path=config, overrides=tuple(overrides or ()))
    given = source.config()
    output = Path(given.output)
    where = Where(
        directory=output.with_name(f"{output.name}-sweep") if directory is None else directory,
        address=given.runtime.address,
        workers=workers,
        go_on=f"fedlora {shlex.join(sys.argv[1:])}",
    )
    request = Sweep(source=source, grids=grid, seeds=seeds, where=where)
    with many_runs(where.directory, where.go_on):
        found, failures = work(request, lambda line: print(line, file=sys.stderr, flush=True))
    show(found, _text(found, where.directory), form)
    if failures:
        total = len(found["settings"]) * seeds
        raise IncompleteError(incomplete(failures, total, "runs", where.go_on))


def _text(found: Mapping[str, Any], directory: Path) -> str:
    from fedlora.compare.sweep_page import heading, heads_of, notes, rows_of

    rows = "\n".join(line.rstrip() for line in table(heads_of(found), rows_of(found)).splitlines())
    files = ", ".join(f"sweep.{kind}" for kind in ("json", "csv", "html"))
    return "\n".join(
        [heading(found), rows, "", *(f"  {note}" for note in notes(found)), f"  {directory}: {files}, runs/"]
    )
