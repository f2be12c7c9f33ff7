"""The command that looks over an installation: what is there, what is not, and what mends it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import Format, FormatOption, SetOption, only_ours, show
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.doctor.line import Line


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("doctor", short_help="Look over machine, config, server and keys; say the mend.")(doctor)


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A run.yaml or a node.yaml.", show_default=False)
    ] = None,
    server: Annotated[
        str | None, typer.Option("--server", metavar="HOST:PORT", help="The server, as nodes reach it.")
    ] = None,
    root_certificates: Annotated[
        Path | None,
        typer.Option(
            "--root-certificates", metavar="FILE", help="CA of the server, PEM. Without it: this machine's."
        ),
    ] = None,
    kit: Annotated[
        Path | None, typer.Option("--kit", metavar="DIR", help="What `fedlora provision` wrote.")
    ] = None,
    overrides: SetOption = None,
    form: FormatOption = Format.TEXT,
) -> int:
    """Look over machine, config, server and keys. Nothing is changed; each line that is not ok says the mend.

    Exit status: 0 if nothing failed, 2 if something did, 3 if a ledger does not hold.
    """
    from fedlora.doctor.doctor import examine, exit_status

    if root_certificates is not None and server is None:
        raise ConfigError("--root-certificates: for whom? no server is named; write: --server HOST:PORT")
    if overrides and config is None:
        raise ConfigError("--set: of which config? none is given; name a run.yaml or a node.yaml too")
    named = {"server": server, "root_certificates": root_certificates, "kit": kit}
    with only_ours():
        lines = list(examine(config, overrides=overrides or (), **named))
    status = exit_status(lines)
    value = {
        "lines": [
            {"name": line.name, "state": line.state, "found": line.found, "mend": line.mend} for line in lines
        ],
        "failed": sum(line.state == "fail" for line in lines),
        "warned": sum(line.state == "warn" for line in lines),
        "exit_status": status,
    }
    show(value, _text(lines), form)
    return status


def _text(lines: Sequence["Line"]) -> str:
    """State, name and what was found in columns; the mend below what needs one."""
    width = max(len(line.name) for line in lines)
    rows = []
    for line in lines:
        rows.append(f"  {line.state:4}  {line.name.ljust(width)}  {line.found}")
        if line.mend:
            rows.append(f"  {'':4}  {'':{width}}  -> {line.mend}")
    failed = sum(line.state == "fail" for line in lines)
    warned = sum(line.state == "warn" for line in lines)
    verdict = f"{failed} failed, {warned} to look at" if failed or warned else "all is well"
    return "\n".join([*rows, "", f"  {verdict}"])
