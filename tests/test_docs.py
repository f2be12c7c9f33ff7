"""What docs/privacy.md and docs/reliability.md say is tested is tested: what their tables name is there."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from fedlora.compare import grid as grid_module
from fedlora.compare.cells import Source
from fedlora.compare.grid import axes_of, checked, settings_of
from fedlora.config.load import config_digest, dump_config
from fedlora.config.located import flat
from fedlora.tracking.figures import figures
from fedlora.tracking.telling import PACKAGES

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


GUARD = re.compile(r"^\| .* \| .* \| .* \| (`test_.*`) \|$")


def test_each_guard_of_the_table_names_tests_that_exist():
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    rows = [set(NAME.findall(match[1])) for line in lines if (match := GUARD.match(line))]
    assert len(rows) == 7
    assert set.union(*rows) <= functions(), sorted(set.union(*rows) - functions())


def test_what_the_page_on_trackers_names_is_what_there_is():
    """Trackers and extras of the schema and of pyproject.toml, and each figure of a round."""
    page = (ROOT / "docs" / "tracking.md").read_text()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert listed == {"jsonl", *PACKAGES} and set(PACKAGES) <= declared.keys()
    assert all(f"fedlora[{name}]" in page for name in PACKAGES)
    counts = {name: ["a"] for name in ("asked", "answered")} | {"refused": {}, "rejected": {}}
    line = {
        **counts, "metric": "METRIC", "score": 1.0, "loss": 1.0, "epsilon_max": 1.0, "seconds": 1.0,
        "public_clip_share": 1.0, "update_norm": {"a": 2.0}, "noise_norm": {"a": 1.0},
    }  # fmt: skip
    told = page.partition("## What is told")[2].partition("At the start")[0]
    assert set(re.findall(r"`([^`]+)`", told)) == set(figures(line))


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


ADAPTERS = (ROOT / "docs" / "adapters.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", ADAPTERS, re.DOTALL))
def test_what_the_page_on_adapters_writes_is_a_config(block, tiny_config):
    written = yaml.safe_load(block)
    config = tiny_config(**written).model_dump(mode="json")
    for key, value in written.items():
        assert {**config[key], **value} == config[key] if isinstance(value, dict) else config[key] == value


def test_the_page_on_adapters_names_tests_that_exist():
    names = re.findall(r"\| `(test_\w+)` \|", ADAPTERS)
    assert names and set(names) <= functions()


LAPTOP_TO_CLUSTER = ("runtime.address", "runtime.device")


def test_a_laptop_a_gpu_and_a_cluster_differ_by_the_two_lines_that_scale_md_shows(tiny_config):
    text = (ROOT / "docs" / "scale.md").read_text()
    block = next(code for code in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "device" in code)
    cluster = yaml.safe_load(block)["runtime"]
    without = {
        key
        for key, line in ((line.split(":")[0].strip(), line) for line in block.splitlines())
        if "a laptop" in line
    }
    assert {f"runtime.{key}" for key in without} == set(LAPTOP_TO_CLUSTER)
    places = [
        {key: value for key, value in cluster.items() if key not in left}
        for left in (without, {"address"}, set())
    ]
    configs = [tiny_config(runtime=place) for place in places]
    flat_configs = [dict(flat(config.model_dump(mode="json"))) for config in configs]
    for other in flat_configs[1:]:
        different = {".".join(key) for key, value in other.items() if flat_configs[0][key] != value}
        assert different - {"runtime"} <= set(LAPTOP_TO_CLUSTER) and different
    assert len({config_digest(config) for config in configs}) == 1


def sweep_grids() -> list[str]:
    """What docs/sweeps.md varies: the options of its command, and its file."""
    text = (ROOT / "docs" / "sweeps.md").read_text()
    return re.findall(r"--grid ([\w.]+=\S+)", text)


def test_the_sweep_that_the_page_shows_is_one(tiny_config, tmp_path):
    path, grid = tmp_path / "given.yaml", tmp_path / "grid.yaml"
    path.write_text(dump_config(tiny_config()))
    text = (ROOT / "docs" / "sweeps.md").read_text()
    grid.write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert len(sweep_grids()) == 2
    for given in (sweep_grids(), [str(grid)]):
        settings = settings_of(axes_of(given))
        assert len(settings) == 6 and all(checked(Source(path=path), setting) for setting in settings)


def test_the_sweep_page_names_every_file_and_every_key_that_is_not_varied():
    text = (ROOT / "docs" / "sweeps.md").read_text()
    assert all(f"`{key}`" in text for key in grid_module._OURS)
    written = re.findall(r'directory / "(sweep\.\w+)"', (ROOT / "fedlora/compare/sweep.py").read_text())
    assert len(written) == 3 and all(f"`{name}`" in text for name in written)
