"""Whatever fedlora refuses, its message says what to do next: behind a semicolon, in every place that raises."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "fedlora"
OURS = {
    "ConfigError",
    "DataError",
    "ModelError",
    "PrivacyError",
    "LedgerError",
    "IncompleteError",
    "GuardError",
}


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each message that is written where it is raised, a pair of braces for each value in it."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        called, first = node.exc.func, node.exc.args[0]
        if (
            isinstance(called, ast.Name)
            and called.id in OURS
            and isinstance(first, ast.JoinedStr | ast.Constant)
        ):
            parts = first.values if isinstance(first, ast.JoinedStr) else [first]
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)


def says_what_next(message: str) -> bool:
    """What follows a semicolon or names a command; a message that ends with a value may end with the move."""
    return ";" in message or ": fedlora " in message or message.endswith("{}")


def test_every_refusal_names_the_next_move():
    found = [
        (str(path.relative_to(ROOT)), line, message)
        for path in sorted(ROOT.rglob("*.py"))
        for line, message in messages(path.read_text())
    ]
    assert len(found) > 300
    silent = [place for place in found if not says_what_next(place[2])]
    assert not silent, silent


def test_a_message_that_only_complains_is_found():
    source = (
        'raise ConfigError(f"{path}: no such file")\nraise DataError(f"{n}; more")\nraise ValueError("x")'
    )
    assert [(line, says_what_next(message)) for line, message in messages(source)] == [(1, False), (2, True)]
