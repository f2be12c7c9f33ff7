"""The documentation is whole: every key, command and option has its words, and what the pages type exists."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from pydantic import BaseModel

from docs.make_reference import HERE, commands, pages, sections
from fedlora.cli.app import app
from fedlora.config.explain import sections_in
from fedlora.config.node import NodeConfig
from fedlora.config.schema import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "clients/README.md", "server/README.md")),
    ]
)
SAYS_WHICH = {"kind", "name", "source"}
"""Keys with one possible value, which picks the section they stand in."""


def group() -> click.Group:
    found = typer.main.get_command(app)
    assert isinstance(found, click.Group)
    return found


COMMANDS = dict(commands(group()))


@pytest.mark.parametrize("name", sorted(pages()))
def test_the_reference_is_what_schema_and_commands_say_now(name):
    assert (HERE / name).read_text() == pages()[name], "write it anew: python docs/make_reference.py"


@pytest.mark.parametrize("model", [RunConfig, NodeConfig])
def test_every_key_has_its_words(model):
    wordless = [
        f"{path}.{name}"
        for path, section in sections(model)
        for name, field in section.model_fields.items()
        if not field.description and not _has_words_of_its_own(section, name)
    ]
    assert not wordless


def _has_words_of_its_own(section: type[BaseModel], name: str) -> bool:
    inner = sections_in(section.model_fields[name].annotation)
    return name in SAYS_WHICH or (bool(inner) and all(found.__doc__ for found in inner))


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_every_command_and_option_has_its_help(words):
    command = COMMANDS[words]
    assert command.help
    assert [p.name for p in command.params if not getattr(p, "help", None) and p.name != "help"] == []


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def typed(path: Path) -> list[list[str]]:
    """The words of every `fedlora ...` that a page's shell blocks type, continued lines joined."""
    lines = [line for text in blocks(path, "sh") for line in text.replace("\\\n", " ").splitlines()]
    found = [part for line in lines for part in re.split(r"&&|;|\|", line.partition(" #")[0])]
    return [shlex.split(part) for part in found if re.match(r"\s*(\.venv/bin/)?fedlora\s", part)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_types_are_commands_and_options_that_exist(path):
    for words in typed(path):
        if path.name == "commands.md":
            continue  # made from the commands
        command: click.Command = group()
        rest = words[1:]
        while isinstance(command, click.Group) and rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        options |= {option for parameter in command.params for option in parameter.secondary_opts}
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert command is not group() and used <= options, f"{shlex.join(words)}: {sorted(used - options)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(path):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_on_a_page_is_python(path):
    for text in blocks(path, "python"):
        ast.parse(text)
