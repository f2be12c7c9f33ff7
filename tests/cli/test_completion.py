"""Shell completion: the script of each shell, and what a real bash gets by it."""

import os
import shutil
import subprocess
import sys

import pytest
import typer

from fedlora.cli.app import main


def answers(words: list[str]) -> list[str]:
    """What may stand where the last word does."""
    return [line.removeprefix("plain,") for line in told(words)]


def told(words: list[str]) -> list[str]:
    """The same as bash hears it, each with its kind."""
    asked = {
        "_FEDLORA_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [sys.executable, "-m", "fedlora"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script_that_asks_fedlora(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_FEDLORA_COMPLETE={shell}_complete" in script and "fedlora" in script


def test_another_app_of_typers_in_this_process_changes_nothing(capsys):
    other = typer.Typer()
    other.command()(lambda: None)
    typer.main.get_command(other)  # typer puts classes of its own in the place of click's
    assert main(["completion", "zsh"]) == 0
    assert "_FEDLORA_COMPLETE=zsh_complete" in capsys.readouterr().out


def test_another_shell_is_refused_and_the_three_are_named(capsys):
    assert main(["completion", "csh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err


def test_commands_and_options_are_completed():
    assert set(answers(["fedlora", "s"])) == {"status", "schema", "serve", "simulate", "sweep"}
    assert "--grid" in answers(["fedlora", "sweep", "--g"])
    assert told(["fedlora", "check", "run"]) == ["file,run"]  # bash looks itself


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_script_is_one_that_bash_takes(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(
        ["bash", "-c", f"{script}\ncomplete -p fedlora"], capture_output=True, text=True, check=True
    )
    assert "_fedlora_completion" in done.stdout
