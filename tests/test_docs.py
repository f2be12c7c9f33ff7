"""What docs/privacy.md and docs/reliability.md say is tested is tested: what their tables name is there."""

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


FAULT = re.compile(r"^\| F(\d+) \|.*\|(.*)\|$")
FILE = re.compile(r"`([\w/]+\.py)`")
FAULTS = range(1, 55)


def faults() -> dict[int, set[str]]:
    """The files that docs/reliability.md names, by the number of the fault that their tests inject."""
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    found = [match.groups() for line in lines if (match := FAULT.match(line))]
    return {int(number): set(FILE.findall(names)) for number, names in found}


@cache
def injected() -> dict[int, set[str]]:
    """The files with tests that are marked so, by the number of the fault."""
    found: dict[int, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        whole = [node.value for node in tree.body if isinstance(node, ast.Assign) and _is_mark(node.targets)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in (n for mark in (*whole, *node.decorator_list) for n in _faults_of(mark)):
                    found.setdefault(number, set()).add(str(path.relative_to(ROOT / "tests")))
    return found


def _is_mark(targets: list[ast.expr]) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in targets)


def _faults_of(mark: ast.expr) -> list[int]:
    calls = [node for node in ast.walk(mark) if isinstance(node, ast.Call)]
    marks = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "fault"]
    words = [word.value for call in marks for word in call.args if isinstance(word, ast.Constant)]
    return [int(str(word).removeprefix("F")) for word in words]


def test_the_table_has_every_fault_once():
    assert sorted(faults()) == list(FAULTS)


@pytest.mark.parametrize("number", FAULTS)
def test_a_fault_is_injected_by_the_files_that_the_table_names_and_by_no_others(number):
    assert faults()[number] == injected().get(number, set()) != set()
