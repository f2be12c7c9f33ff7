"""YAML as fedlora reads it: plain scalars of version 1.2, no key twice, no aliases, the line of everything.

PyYAML alone speaks YAML 1.1, where `1e-5` is text, `no` is false and `1:30` is ninety; of duplicate keys it
silently takes the last.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from fedlora.errors import ConfigError

KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys and list positions from the top of the document."""

# The core schema of YAML 1.2.2, section 10.3.2, in the order in which it is tried.
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        list("-+.0123456789"),
    ),
}

_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in (*_PLAIN, "str", "seq", "map"))
"""Everything else, an object of Python above all, is refused."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's own class table, begun anew

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(
                None, None, f"alias *{event.anchor} is not read here; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML version would read as something other than text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # a copy, so that PyYAML's own stays as it is
        key: list(pairs) for key, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return (
        int(text[2:], 8)
        if text.startswith("0o")
        else int(text[2:], 16)
        if text.startswith("0x")
        else int(text)
    )


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(
        loader.construct_scalar(node).replace(".inf", "inf").replace(".Inf", "inf").replace(".nan", "nan")
    )


for _kind, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A parsed YAML text: its value, and the line (from 1) of every key and list item in it."""

    value: Any
    lines: Mapping[KeyPath, int]


def parse(text: str, source: str) -> Document:
    """The value of the one YAML document in `text`.

    Args:
        text: YAML.
        source: what errors call it: a file name, or the option it came from.

    Raises:
        ConfigError: not YAML, a key twice, a key that is not a word, an alias, a tag that is not plain data.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        lines: dict[KeyPath, int] = {(): 1}
        return Document(value=None if root is None else _value(loader, root, (), lines, source), lines=lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise ConfigError(
            f"{source}:{line}: not readable as YAML: {error.problem or error.context}"
        ) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"{source}:{line}: character U+{error.character:04X} may not stand in YAML; remove it"
        raise ConfigError(message) from None
    except RecursionError:
        raise ConfigError(
            f"{source}:1: brackets are nested too deeply to be a config; write it flatter"
        ) from None
    finally:
        loader.dispose()


def _value(loader: _Loader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: str) -> Any:
    """The node as plain data; `lines` gains an entry for every key and item below it."""
    if node.tag not in _TAGS:
        line = node.start_mark.line + 1
        raise ConfigError(
            f"{source}:{line}: tag {node.tag} is not read here; write plain text, numbers, lists"
        )
    if isinstance(node, yaml.SequenceNode):
        items = list(enumerate(node.value))
        lines.update({(*path, index): item.start_mark.line + 1 for index, item in items})
        return [_value(loader, item, (*path, index), lines, source) for index, item in items]
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, lines, source)
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError):
        line = node.start_mark.line + 1
        raise ConfigError(
            f"{source}:{line}: {node.value[:40]!r} cannot be read as a number; shorten it"
        ) from None


def _mapping(
    loader: _Loader, node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int], source: str
) -> Any:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
        if isinstance(key, int | float) and not isinstance(key, bool):
            key = key_node.value
        if not isinstance(key, str):
            raise ConfigError(
                f"{source}:{line}: a key must be a word, not {key!r}; put the word before the colon"
            )
        name = ".".join(map(str, (*path, key)))
        if key in found:
            first = lines[(*path, key)]
            raise ConfigError(
                f"{source}:{line}: {name}: already written in line {first}; keep one of the two"
            )
        lines[(*path, key)] = line
        found[key] = _value(loader, value_node, (*path, key), lines, source)
    return found


def render(value: Any) -> str:
    """YAML text that `parse` reads back to an equal value, keys in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
