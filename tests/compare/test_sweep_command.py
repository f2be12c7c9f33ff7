"""`fedlora sweep` for real: interrupted, gone on with, told again, and what each row is made of."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.compare.cells import Source
from fedlora.compare.finish import Where
from fedlora.compare.sweep import Sweep, sweep
from fedlora.config.load import dump_config
from fedlora.config.schema import Runtime
from fedlora.runs.rundir import finished_summary, run_config
from fedlora.runtime.cluster import connected

SMALL = {
    "federation__rounds": 1,
    "federation__local_steps": 1,
    "data__partition": {"kind": "iid", "clients": 3},
}
GRID = "privacy.target_epsilon=2,8"


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray, started once for all sweeps of this process."""
    with connected(Runtime(kind="ray", workers=1), "tests", tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture
def config_file(tiny_config, tmp_path) -> Path:
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(tiny_config(**SMALL)))
    return path


def interrupted(config_file: Path, directory: Path) -> None:
    """A sweep that somebody stops after its first run."""

    def tell(line: str) -> None:
        if line.startswith("run 1/2"):
            raise KeyboardInterrupt

    where = Where(directory=directory, address=None, workers=1, go_on="again")
    with pytest.raises(KeyboardInterrupt):
        sweep(Sweep(source=Source(path=config_file), grids=[GRID], seeds=1, where=where), tell)


@pytest.mark.slow  # Ray starts twice; a comparison does the same
def test_a_sweep_that_is_interrupted_goes_on_and_ends_as_one_that_is_left_alone(
    config_file, tmp_path, capsys, workers
):
    struck, whole = tmp_path / "struck", tmp_path / "whole"
    interrupted(config_file, struck)
    kept = {path: path.stat().st_mtime_ns for path in struck.glob("runs/*/summary.json")}
    assert len(kept) == 1 and not (struck / "sweep.json").exists()
    for directory in (struck, whole):
        given = ["sweep", str(config_file), "--grid", GRID, "--to", str(directory), "--workers", "1"]
        assert main([*given, "--format", "json"]) == 0
        out, err = capsys.readouterr()
        assert ("1 of 2 runs are finished already" in err) is (directory == struck)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("sweep.json", "sweep.csv", "sweep.html"):
        assert (struck / name).read_bytes() == (whole / name).read_bytes()
    found = json.loads(out)
    assert found == json.loads((whole / "sweep.json").read_text())
    _is_what_the_runs_say(found, whole)

    assert main(given) == 0
    out, err = capsys.readouterr()
    assert err == "2 of 2 runs are finished already\n" and "2 settings, 1 seed each" in out
    assert "{private_runs: 3}" in out and "SIMULATION" in out

    # A grid that grows runs what is new; another config in the same place is refused.
    assert main([*given[:3], "privacy.target_epsilon=8,4,2", *given[4:]]) == 0
    assert "2 of 3 runs are finished already" in capsys.readouterr().err
    assert main([*given, "--set", "lora.r=1"]) == 2
    assert "lora.r is 2 there, 1 here" in capsys.readouterr().err


def _is_what_the_runs_say(found: dict, directory: Path) -> None:
    assert found["finished"] and [row["set"] for row in found["settings"]] == [
        {"privacy.target_epsilon": 2},
        {"privacy.target_epsilon": 8},
    ]
    for row in found["settings"]:
        run_dir = directory / "runs" / row["runs"][0]["run_dir"]
        summary, config = finished_summary(run_dir) or {}, run_config(run_dir)
        assert config.privacy.target_epsilon == row["set"]["privacy.target_epsilon"]
        assert row["mean"] == summary["score"] and row["interval"] is None
        assert row["epsilon_max"] == summary["epsilon_max"] <= config.privacy.target_epsilon
        assert row["runs"][0]["state_sha256"] == summary["state_sha256"]


@pytest.mark.slow  # Ray starts; a comparison does the same
def test_a_run_that_fails_is_told_and_the_others_go_on(config_file, tmp_path, capsys, workers):
    to = tmp_path / "to"
    given = ["--grid", "lora.target_modules=[query],[nowhere]", "--set", "privacy=none", "--to", str(to)]
    assert main(["sweep", str(config_file), *given, "--workers", "1", "--format", "json"]) == 4
    out, err = capsys.readouterr()
    assert "1 of 2 runs failed:" in err and "give the same command again" in err
    found = json.loads(out)
    assert [row["mean"] is None for row in found["settings"]] == [False, True]
    assert not found["finished"] and not found["private_runs"]
