"""The console script: commands, exit statuses, and one message for whatever goes wrong.

Exit status: 0 done - 1 unexpected - 2 usage or config - 3 refused for privacy - 4 incomplete.
Torch and Ray are imported by the commands that need them, so that `--help` answers at once.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import click
import typer
import typer.core

from fedlora.cli import (
    audit,
    compare,
    completion,
    doctor,
    export,
    forget,
    init,
    node,
    provision,
    read,
    run,
    serve,
    sweep,
)
from fedlora.errors import ConfigError, FedLoraError, IncompleteError

typer.core.HAS_RICH = (
    False  # help is plain here, and typer would escape brackets for a markup that nobody renders
)

app = typer.Typer(
    name="fedlora",
    help="Federated LoRA fine-tuning under record-level differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click does already
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# As `--help` lists them: in the order in which they are needed.
init.add_to(app)
run.add_to(app)
read.add_to(app)
export.add_to(app)
compare.add_to(app)
sweep.add_to(app)
forget.add_to(app)
audit.add_to(app)
doctor.add_to(app)
provision.add_to(app)
node.add_to(app)
serve.add_to(app)
completion.add_to(app)

_INTERRUPTED = 130
"""What typer makes of Ctrl-C, without a word."""
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DEDUP_LOGS": "1",
    "GRPC_VERBOSITY": "NONE",
}
"""What libraries would otherwise print between the lines of our own progress; the user's own settings win."""


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"fedlora {version('fedlora')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of whatever goes wrong.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Tell the version, and leave.", callback=_tell_version, is_eager=True),
    ] = False,
) -> None:
    """Federated LoRA fine-tuning under record-level differential privacy."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of one command; its one message, if it failed, is on stderr.

    Args:
        arguments: those of the command line; None takes the process's own. `--debug` may stand anywhere.
    """
    if (asked := os.environ.get(completion.VARIABLE)) is not None:
        return completion.answer(typer.main.get_command(app), asked)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        status = app(
            [word for word in given if word != "--debug"], prog_name="fedlora", standalone_mode=False
        )
        sys.stdout.flush()
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, status = explain(error)
        if message:
            print(message, file=sys.stderr)
        return status


def explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit status for something that ended a command."""
    match error:
        case FedLoraError():
            return str(error), error.exit_status
        case click.exceptions.NoArgsIsHelpError():
            return error.format_message(), ConfigError.exit_status
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "fedlora"
            return f"{error.format_message()} See `{command} --help`.", ConfigError.exit_status
        case click.ClickException():
            return error.format_message(), ConfigError.exit_status
        case KeyboardInterrupt() | click.Abort():
            return "interrupted; nothing was lost, give the same command again", IncompleteError.exit_status
        case _:
            first = (str(error).splitlines() or ["no message"])[0]
            again = "give the command again with --debug for the traceback"
            return f"unexpected {type(error).__name__}: {first}; {again}", 1


if __name__ == "__main__":
    sys.exit(main())
