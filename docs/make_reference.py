"""Writes the pages of docs/reference from the schema and the commands: `python docs/make_reference.py`.

They are kept in the repository so that they can be read there; tests/test_docs_complete.py says when they are old.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import typer
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedlora.cli.app import app
from fedlora.config.explain import sections_in, wanted
from fedlora.config.node import NodeConfig
from fedlora.config.schema import RunConfig

HERE = Path(__file__).parent / "reference"
MADE = "<!-- made by docs/make_reference.py -->"


def pages() -> dict[str, str]:
    """Every page by the name of its file."""
    return {
        "run-yaml.md": _config_page(
            RunConfig,
            "run.yaml",
            "A whole run. `fedlora schema` prints the same for editors, as JSON Schema.",
        ),
        "node-yaml.md": _config_page(
            NodeConfig, "node.yaml", "What a data owner decides, and no server can change."
        ),
        "commands.md": _commands_page(),
    }


def _config_page(model: type[BaseModel], name: str, what: str) -> str:
    parts = [f"{MADE}\n\n# {name}\n\n{what} A key without a default has to be written."]
    told_once = dict.fromkeys(sections(model))  # a partition is the same under every source
    parts += [_section(path, section) for path, section in told_once]
    return "\n\n".join(parts) + "\n"


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The model and every section within, in the order of the file: where it stands, and itself."""
    yield path, model
    for name, annotation in get_type_hints(model, include_extras=True).items():
        if name not in model.model_fields:
            continue
        for inner in sections_in(annotation):
            yield from sections(inner, f"{path}.{name}" if path else name)


def _section(path: str, model: type[BaseModel]) -> str:
    tag = next((name for name in ("kind", "name", "source") if _is_constant(model, name)), None)
    choice = f" with `{tag}: {_constant(model, tag)}`" if tag else ""
    heading = f"## `{path}`{choice}" if path else "## The whole"
    fields = get_type_hints(model, include_extras=True)
    lines = ["| key | what may stand there | default | |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        meaning = field.description or ("says which" if name == tag else _first_words(fields[name]))
        cells = (f"`{name}`", wanted(fields[name]), _default(field), meaning)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return f"{heading}\n\n{_words(model.__doc__)}\n\n" + "\n".join(lines)


def _is_constant(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    words = get_args(field.annotation) if field is not None and field.is_required() else ()
    return len(words) == 1 and isinstance(words[0], str)


def _constant(model: type[BaseModel], name: str) -> str:
    return str(get_args(model.model_fields[name].annotation)[0])


def _first_words(annotation: Any) -> str:
    """Of a section without a sentence of its own in its parent: what the section says of itself."""
    inner = sections_in(annotation)
    if len(inner) == 1:
        return _words(inner[0].__doc__)
    return f"one of {len(inner)} sections below" if inner else ""


def _default(field: Any) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
    return f"`{text}`"


def _commands_page() -> str:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    parts = [
        f"{MADE}\n\n# Commands\n\nReading commands take `--format json`: one document on stdout, nothing else. Exit "
        "status: 0 done, 1 unexpected, 2 usage or config, 3 refused for privacy, 4 incomplete.",
        _command("fedlora", group),
    ]
    parts += [
        _command(f"fedlora {words}", command) for words, command in commands(group) if not command.hidden
    ]
    return "\n\n".join(parts) + "\n"


def commands(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by the words that call it, those of groups too."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
            if not command.invoke_without_command:
                continue
        yield f"{before}{name}", command


def _command(words: str, command: click.Command) -> str:
    context = click.Context(command, info_name=words)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [record for parameter in command.params if (record := _parameter(parameter, context))]
    table = "\n".join(["| | |", "| --- | --- |", *rows])
    return f"## `{words}`\n\n```sh\n{words} {usage}\n```\n\n{_words(command.help)}" + (
        f"\n\n{table}" if rows else ""
    )


def _parameter(parameter: click.Parameter, context: click.Context) -> str | None:
    record = parameter.get_help_record(context)
    return None if record is None else f"| `{_cell(record[0])}` | {_cell(record[1])} |"


def _words(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def _cell(text: str) -> str:
    """On one line; angle brackets and bars are text."""
    return _words(text).replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Every page is written."""
    HERE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
