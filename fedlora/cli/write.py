"""Commands that write files: init, export."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.output import Format, FormatOption, RunDirArgument, only_ours, show
from fedlora.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """The app knows these commands."""
    app.command("init", short_help="Write a commented run.yaml that runs offline.")(init)
    app.command("export", short_help="Write a PEFT directory or a merged model.")(export)


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to write; made if missing.")
    ] = Path(),
    node: Annotated[bool, typer.Option("--node", help="node.yaml, for a data owner.")] = False,
) -> None:
    """Write a commented run.yaml that runs offline as it is."""
    from fedlora.config.template import NODE_YAML, run_yaml

    target = directory / ("node.yaml" if node else "run.yaml")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(NODE_YAML if node else run_yaml(directory.resolve().name))
    except FileExistsError:
        raise ConfigError(f"{target} exists already and is left alone; name another directory") from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}); name another directory") from None
    print(f"{target} written; look at it, then: fedlora {'check' if node else 'simulate'} {target}")


def export(
    run_dir: RunDirArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A directory that is not there yet.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole model with the adapter added in.")
    ] = False,
    form: FormatOption = Format.TEXT,
) -> None:
    """Write a PEFT directory (or a merged model), loaded again and compared before this says done."""
    from fedlora.export.peft_directory import write_adapter
    from fedlora.runs.rundir import adapters_of, run_config
    from fedlora.runs.summary import summary_so_far

    with only_ours():
        summary, config = summary_so_far(run_dir), run_config(run_dir)
        adapters, classes = adapters_of(run_dir)
        write_adapter(to, config=config, adapters=adapters, classes=classes, summary=summary, merge=merge)
    kind = "merged model" if merge else "adapter"
    show({"directory": str(to), "merged": merge}, f"{to}: {kind} written, loaded again, logits equal", form)
