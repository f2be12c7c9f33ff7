"""The command that takes an adapter out of a run, and perhaps to the hub."""

from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import Format, FormatOption, RunDirArgument, only_ours, show
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.export.push import Pushed


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("export", short_help="Write a PEFT directory or a merged model, or push it.")(export)


class Server(StrEnum):
    """Who will serve the adapter."""

    VLLM = "vllm"


def export(
    run_dir: RunDirArgument,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", metavar="DIR", help="A directory that is not there yet; with --push it may be left out."
        ),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option("--client", metavar="NAME", help="With this client's own B, of a fedsa simulation."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole model with the adapter added in.")
    ] = False,
    server: Annotated[
        Server | None, typer.Option("--for", help="Check first what this server asks of an adapter.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="OWNER/NAME",
            help="Upload it, with its card, to the hub, in place of what is there.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who may see what --push uploads.")
    ] = True,
    form: FormatOption = Format.TEXT,
) -> None:
    """Write a PEFT directory (or a merged model), loaded again and compared before this says done; perhaps push it."""
    if to is None and push is None:
        raise ConfigError(
            "--to: missing; name a directory that is not there yet, or a repository with --push"
        )
    if merge and server is not None:
        raise ConfigError(
            f"--for {server}: asks about an adapter, but --merge writes a whole model; leave one out"
        )
    with only_ours(), TemporaryDirectory() as scratch:
        if push is not None:  # before the minutes that an export may take
            _require_pushable(push)
        directory = Path(scratch) / "adapter" if to is None else to
        served = _exported(run_dir, directory, client=client, merge=merge, server=server)
        there = None if push is None else _pushed(directory, push, private=private)
    kind = "merged model" if merge else "adapter"
    kind += "" if client is None else f" with the B of {client}"
    where = str(push if to is None else to)
    lines = [f"{where}: {kind} written, loaded again, logits equal", *_unfinished(run_dir)]
    lines += [] if served is None else [f"vllm serve BASE {served} --lora-modules NAME={where}"]
    lines += [] if there is None else [f"pushed to {there.address}, {_seen(there, private=private)}"]
    value = {
        "directory": None if to is None else str(to),
        "client": client,
        "merged": merge,
        "serve": served,
        "pushed": None if there is None else there.address,
        "private": None if there is None else there.private,
    }
    show(value, "\n".join(lines), form)


def _require_pushable(repository: str) -> None:
    from fedlora.export.push import require_pushable

    require_pushable(repository)


def _pushed(directory: Path, repository: str, *, private: bool) -> "Pushed":
    from fedlora.export.push import push

    return push(directory, repository, private=private)


def _seen(there: "Pushed", *, private: bool) -> str:
    """Who sees it; and, where --public was said in vain, where that is changed. private: as asked for."""
    if not there.private:
        return "public"
    return "private" if private else f"which stays private; make it public at {there.address}/settings"


def _unfinished(run_dir: Path) -> list[str]:
    """What to know of a run that has rounds to go."""
    from fedlora.runs.rundir import finished_summary, run_config, run_rounds

    if finished_summary(run_dir) is not None:
        return []
    done, of = run_rounds(run_dir)[-1]["round"], run_config(run_dir).federation.rounds
    return [f"NOT FINISHED: this is the adapter of round {done} of {of}"]


def _exported(
    run_dir: Path, directory: Path, *, client: str | None, merge: bool, server: Server | None
) -> str | None:
    """The directory holds the export; what options a server is to be started with, if one was named."""
    from fedlora.export.peft_directory import as_peft, write_adapter
    from fedlora.runs.rundir import run_config
    from fedlora.runs.summary import summary_so_far
    from fedlora.runs.trained import trained_adapters

    summary, config = summary_so_far(run_dir), run_config(run_dir)
    adapters, classes = trained_adapters(run_dir)
    if client is not None:
        from fedlora.runs.own_b import own_adapters

        adapters = own_adapters(run_dir, client)
        summary = {**summary, "score": summary.get("personal", {}).get(client), "of_client": client}
    options = None
    if server is not None:
        from fedlora.export.vllm import require_servable_by_vllm

        options = require_servable_by_vllm(config, as_peft(adapters)).options
    write_adapter(
        directory,
        config=config,
        adapters=adapters,
        classes=classes,
        summary=summary,
        merge=merge,
        one_rank=server is not None,
    )
    return options
