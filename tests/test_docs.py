"""What docs/privacy.md says is tested is tested: every test and check that its table names is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \|(.*)\|(.*)\|$")
NAME = re.compile(r"`(\w+)`")


def rows() -> dict[int, tuple[str, str]]:
    lines = (ROOT / "docs" / "privacy.md").read_text().splitlines()
    found = [match.groups() for line in lines if (match := ROW.match(line))]
    return {int(number): (promise.strip(), proof.strip()) for number, promise, proof in found}


@cache
def functions() -> frozenset[str]:
    """Every function that pytest runs, and every check that a mutation is caught by."""
    named = set()
    for path in (ROOT / "tests").rglob("*.py"):
        named |= {
            node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
        }
    return frozenset(named)


def test_the_table_has_every_invariant_once():
    assert sorted(rows()) == list(range(1, 45))


@pytest.mark.parametrize("number", range(1, 45))
def test_what_holds_an_invariant_is_named_and_exists_or_a_reason_is_given(number):
    promise, proof = rows()[number]
    assert promise
    names = NAME.findall(proof)
    assert set(names) <= functions(), sorted(set(names) - functions())
    assert names or proof.startswith("Does not apply: "), proof
