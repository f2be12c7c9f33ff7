"""The command for a client that withdrew from a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.output import Format, FormatOption, RunDirArgument, only_ours, pairs, show


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("forget", short_help="Erase what a run remembers of a client that withdrew.")(forget)


def forget(
    run_dir: RunDirArgument,
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="Its name in the run.")],
    form: FormatOption = Format.TEXT,
) -> None:
    """Erase a withdrawn client: its stale memory is deleted and subtracted exactly, its stored updates are deleted.

    The run goes on without it; the model keeps what it learned. It may be killed and given again at any moment.
    """
    from dataclasses import asdict

    from fedlora.cli.run_dir import usable
    from fedlora.runs import forgetting

    with only_ours(), usable(run_dir):
        done = forgetting.forget(run_dir, client, erasers(run_dir))
        _report_without_picture(run_dir)
    heading = (
        f"{client} was forgotten already; nothing was done" if done.already else f"{client} is forgotten"
    )
    rows = [
        ("memory", f"{done.records} records erased; their share in the sum subtracted"),
        ("updates", f"{done.updates} stored updates erased"),
        ("run", "finished; its model is as it was" if done.finished else f"goes on with {done.left} clients"),
    ]
    text = heading if done.already else f"{heading}\n{pairs(rows)}"
    show({**asdict(done), "unlearned": False}, f"{text}\n{_KEPT}", form)


def _report_without_picture(run_dir: Path) -> None:
    """Writes a finished run's report again, now without how many records of each label the client had."""
    if not (run_dir / "report.html").exists():
        return
    from fedlora.export.deliver import report_of
    from fedlora.runs.summary import summary_so_far

    report_of(run_dir, run_dir / "report.html", summary_so_far(run_dir))


def erasers(run_dir: Path) -> list[Callable[[str], int]]:
    """Erase a client's updates wherever a run of any kind may store them: as a server heard them, or under way."""
    from fedlora.deploy.journal import erase_updates
    from fedlora.runs.rundir import SPENT
    from fedlora.runtime.world.clock import erase_replies

    return [
        lambda client: erase_updates(run_dir / SPENT, client),
        lambda client: erase_replies(run_dir, client),
    ]


_KEPT = (
    "The model keeps what it learned from this client: nothing is unlearned. Rounds, ledgers and what it said it spent "
    "stay too: its budget is spent. A simulated client's ledger begins with a digest of its records."
)
