"""The command that prints what a shell needs to complete the others."""

from enum import StrEnum
from typing import Annotated

import click
import typer
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

VARIABLE = "_FEDLORA_COMPLETE"
"""Set by the script when it asks this program what may come next; it is answered before any command runs."""


class Shell(StrEnum):
    """Those whose scripts there are."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


_CLASSES: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
"""Click's own, by shell: asked by name, click may answer with typer's, which another app in this process put there."""


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("completion", short_help="Print the completion script of your shell.")(completion)


def completion(shell: Annotated[Shell, typer.Argument(help="Yours.")]) -> None:
    """Print a script that completes commands and options.

    bash: echo 'eval "$(fedlora completion bash)"' >> ~/.bashrc; zsh: the same with zsh, in ~/.zshrc; fish: fedlora
    completion fish > ~/.config/fish/completions/fedlora.fish
    """
    kind = _CLASSES[shell.value]
    print(kind(click.get_current_context().find_root().command, {}, "fedlora", VARIABLE).source())


def answer(command: click.Command, asked: str) -> int:
    """What may come next is on stdout, as the script wants it; the exit status.

    Typer's own answer is of another form, is only there if it adds two options to `--help`, and knows no files: where
    nothing else fits, the shell is told to look for one.
    """
    kind = _CLASSES.get(asked.partition("_")[0])
    if kind is None or asked.partition("_")[2] != "complete":
        return 1
    shell = kind(command, {}, "fedlora", VARIABLE)
    arguments, begun = shell.get_completion_args()
    found = shell.get_completions(arguments, begun) or [CompletionItem(begun, type="file")]
    print("\n".join(shell.format_completion(item) for item in found))
    return 0
