"""Which config or run is meant where a directory of init's is named, and what is said where there is none or nobody."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.cli.run_dir import config_named, kept_in, run_dir_named, scorable
from fedlora.config.load import dump_config, load_config
from fedlora.config.schema import RunConfig
from fedlora.errors import ConfigError
from fedlora.federation.loop import line_zero
from fedlora.runs.rundir import locked


@pytest.fixture
def home(tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> Path:
    """As `init` leaves it: run.yaml, whose output is another directory."""
    tiny_config()
    home = tmp_path / "home"
    home.mkdir()
    return (tmp_path / "run.yaml").rename(home / "run.yaml").parent


@pytest.fixture
def begun(home: Path) -> Path:
    """The run directory of that config, with its zero-step model."""
    config = load_config(home / "run.yaml", ["privacy=none"])
    (home / "run.yaml").write_text(dump_config(config))
    run_dir = Path(config.output)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_config(config))
    line = line_zero({"metric": "accuracy", "score": 0.5, "loss": 1.0})
    (run_dir / "rounds.jsonl").write_text(json.dumps(line) + "\n")
    return run_dir


def refused(capsys, *arguments: object) -> str:
    """What a command says that ends with status 2, in one line and nothing else."""
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def test_a_directory_of_init_stands_for_its_config(home, capsys):
    assert config_named(home) == config_named(home / "run.yaml") == home / "run.yaml"
    assert main(["check", str(home), "--set", "privacy=none"]) == 0
    assert "NOT PRIVATE" in capsys.readouterr().out


def test_a_check_refuses_an_output_that_is_a_file(home, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    told = refused(capsys, "check", home, "--set", f"output={tmp_path / 'taken' / 'run'}")
    assert "taken is no directory, so no run can be kept in" in told


def test_the_directory_and_its_config_stand_for_the_run_that_was_kept(home, begun, capsys):
    assert run_dir_named(home) == run_dir_named(home / "run.yaml") == run_dir_named(begun) == begun
    assert scorable(home) == kept_in(home / "run.yaml") == begun
    for named in (home, home / "run.yaml", begun):
        assert main(["status", str(named)]) == 0
        assert capsys.readouterr().out.startswith(f"{begun}\n")


def test_a_config_that_is_not_the_runs_stands_for_no_run(home, begun, capsys):
    other = home / "run.yaml"
    other.write_text(other.read_text().replace("seed: 7", "seed: 8"))
    for command in (
        ["forget", str(other), "client-0"],
        ["resume", str(home)],
        ["export", str(home), "--to", "x"],
    ):
        assert main(command) == 2
        assert "holds the run of another config (seed is 7 there, 8 here)" in capsys.readouterr().err


def test_a_config_that_was_not_run_yet_is_told_with_the_command_that_runs_it(home, capsys):
    for command in ("resume", "status", "report", "budget"):
        said = refused(capsys, command, home)
        assert said.startswith(f"{home} holds no run: ") and f"fedlora simulate {home}/run.yaml" in said


def test_a_directory_that_is_not_there_is_told_as_that(tmp_path, capsys):
    for command in ("resume", "status", "report"):
        assert "nowhere holds no run: there is no such directory" in refused(
            capsys, command, tmp_path / "nowhere"
        )
    assert "config.yaml is missing" in refused(capsys, "resume", tmp_path)


def test_where_no_config_is_another_command_is_named(tmp_path, home, begun, capsys):
    (tmp_path / "empty").mkdir()
    assert f"fedlora init {tmp_path}/empty" in refused(capsys, "simulate", tmp_path / "empty")
    assert f"fedlora resume {begun}" in refused(capsys, "simulate", begun)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "neither a run nor a PEFT adapter"),
        (
            ("config.json", "model.safetensors"),
            "is a whole model .* perhaps one of export --merge; .* without --merge",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_any_work(tmp_path, home, capsys, files, says):
    given = tmp_path / "given"
    given.mkdir()
    for name in files:
        (given / name).touch()
    with pytest.raises(ConfigError, match=says):
        scorable(given)
    # Nothing of the data is read: they are not there.
    assert str(given) in refused(capsys, "evaluate", given, home, "--set", "data.train=/nowhere")
    assert "no such directory" in refused(capsys, "evaluate", tmp_path / "nowhere", home)


def test_a_run_is_not_written_among_the_files_of_something_else(tmp_path, home, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("thesis.tex", "photos", "b", "a", ".hidden"):
        (other / name).touch()
    said = refused(capsys, "simulate", home, "--run-dir", other)
    assert said.startswith(
        f"{other} holds files that are no run's (a, b, photos and 1 more) and is left alone; "
    )
    assert len([*other.iterdir()]) == 5


def test_status_tells_a_run_that_goes_on_from_one_that_stopped(begun, capsys):
    def told() -> tuple[str, bool]:
        assert main(["status", str(begun)]) == 0
        state = capsys.readouterr().out.splitlines()[1]
        assert main(["status", str(begun), "--format", "json"]) == 0
        return state.removeprefix("  state").strip(), json.loads(capsys.readouterr().out)["running"]

    stopped = (f"not running; go on with: fedlora resume {begun}", False)
    assert told() == stopped
    with locked(begun):
        assert told() == ("running", True)
        with pytest.raises(ConfigError, match="worked on by another process"), locked(begun):
            """The lock is still held by whoever had it."""
    assert told() == stopped
    with locked(begun):
        """Nor does status keep it."""


def test_a_run_that_is_being_prepared_is_to_be_waited_for(begun, capsys):
    (begun / "rounds.jsonl").unlink()
    assert main(["status", str(begun)]) == 4
    assert f"no model yet; go on with: fedlora resume {begun}" in capsys.readouterr().err
    with locked(begun):
        assert main(["status", str(begun)]) == 4
        assert capsys.readouterr().err.endswith("no model yet; it is being prepared: wait\n")
