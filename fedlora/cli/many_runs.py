"""What commands that run many runs have in common: where to, how many at a time, what of a stop or a failure."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fedlora.cli.output import only_ours
from fedlora.cli.run_dir import usable
from fedlora.errors import IncompleteError
from fedlora.interrupts import sigterm_as_ctrl_c

if TYPE_CHECKING:  # both import torch
    from fedlora.compare.cells import Source
    from fedlora.compare.finish import Tell, Where

WorkersOption: TypeAlias = Annotated[
    int | None, typer.Option("--workers", min=1, help="Runs at a time. [default: one a core]")
]


def to_option(command: str) -> Any:
    """`--to` of a command whose directory ends in its name."""
    return typer.Option("--to", metavar="DIR", help=f"[default: the config's `output` and -{command}]")


def where_of(source: "Source", to: Path | None, workers: int | None, command: str) -> "Where":
    """Where the command's runs are to be.

    Args:
        source: the config; its output names the directory, its address the cluster.
        to: `--to`, before what the config says.
        workers: `--workers`.
        command: its name.

    Raises:
        ConfigError: the config is none.
    """
    from fedlora.compare.finish import Where

    config = source.config()
    output = Path(config.output)
    return Where(
        directory=output.with_name(f"{output.name}-{command}") if to is None else to,
        address=config.runtime.address,
        workers=workers,
        go_on=f"fedlora {shlex.join(sys.argv[1:])}",
    )


def told(
    work: "Callable[[Tell], tuple[dict[str, Any], list[str]]]", where: "Where"
) -> tuple[dict[str, Any], list[str]]:
    """What the runs amount to, and those that failed; progress was on stderr, and nothing on stdout.

    Raises:
        ConfigError: see `usable`.
        IncompleteError: Ctrl-C, or SIGTERM.
    """
    try:
        with sigterm_as_ctrl_c(), only_ours(), usable(where.directory):
            return work(lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        raise IncompleteError(
            f"interrupted; every finished round is kept, give the same command again: {where.go_on}"
        ) from None


def require_none(failures: Sequence[str], total: int, what: str, where: "Where") -> None:
    """Passes where nothing failed. total: of the runs; what: they are called.

    Raises:
        IncompleteError: some did; says how to go on.
    """
    from fedlora.compare.finish import incomplete

    if failures:
        raise IncompleteError(incomplete(failures, total, what, where.go_on))
