"""The commands as a person meets them: what they print, what they leave, and the status they end with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from fedlora.cli.app import explain, main
from fedlora.cli.run_dir import usable
from fedlora.config.load import dump_config, load_config
from fedlora.errors import ConfigError, IncompleteError, LedgerError
from tests.lanes import mostly_slow


def fedlora(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own."""
    command = [sys.executable, "-m", "fedlora", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_and_schema_answer_without_importing_torch():
    """An import of torch alone takes seconds; a person who asks for help should not wait for it."""
    loaded = "print(sorted({'torch', 'ray', 'flwr', 'transformers'} & set(sys.modules)))"
    for arguments in (["--help"], ["schema"], ["simulate", "--help"], ["init", "/dev/null/here"]):
        began = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; from fedlora.cli.app import main; main({arguments!r}); {loaded}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
        assert time.monotonic() - began < 20  # a loaded machine; alone it is below one second


def test_every_command_of_the_contract_is_there(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for command in (
        "init",
        "check",
        "simulate",
        "resume",
        "status",
        "budget",
        "audit",
        "compare",
        "sweep",
        "completion",
        "provision",
        "doctor",
        "node",
        "serve",
        "monitor",
        "evaluate",
        "export",
        "report",
        "schema",
    ):
        assert f"\n  {command} " in told
        assert main([command, "--help"]) == 0


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedlora {version('fedlora')}\n"


def test_schema_is_one_json_document(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "fedlora run.yaml"


def test_init_writes_a_run_that_loads_and_never_overwrites(tmp_path, capsys):
    assert main(["init", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / "run.yaml"
    assert load_config(path).privacy != "none" and load_config(path).output == "runs/new"
    path.write_text("mine")
    assert main(["init", str(tmp_path / "new")]) == 2
    assert path.read_text() == "mine" and "left alone" in capsys.readouterr().err
    assert main(["init", str(tmp_path), "--node"]) == 0 and (tmp_path / "node.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate"], "Missing argument 'CONFIG'"),
        (["simulate", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["simulate", "x.yaml", "--sett", "a=b"], "--set"),
        (["bogus"], "No such command 'bogus'"),
        (["schema", "--format", "xml"], "'xml' is not one of"),
        (["status", "nowhere"], "holds no run"),
        (["resume", "nowhere"], "holds no run"),
        (["budget", "nowhere"], "no such file or directory"),
        (["report", "nowhere"], "holds no run"),
        (["export", "nowhere", "--to", "x"], "holds no run"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_config_error_reaches_the_shell_as_it_is(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: -1\n")
    done = fedlora("check", str(path))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"{path}:1: seed: -1 does not fit; write a whole number >= 0" in done.stderr.splitlines()
    assert "Traceback" in fedlora("check", str(path), "--debug").stderr


WORLD = {"availability": {"kind": "day-night", "share": 0.5}}


def test_serve_refuses_a_world_before_anything_is_started_or_written(tiny_config, tmp_path, capsys):
    config = tiny_config(world=WORLD)
    assert config.world is not None
    (path := tmp_path / "run.yaml").write_text(dump_config(config))
    assert main(["serve", str(path), "--superlink", "127.0.0.1:1"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{path}:") and ": world: only simulated clients" in told and "write null" in told
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ConfigError("f:1: a: b; c"), 2, "f:1: a: b; c"),
        (LedgerError("torn"), 3, "torn"),
        (IncompleteError("go on with: fedlora resume d"), 4, "fedlora resume d"),
        (KeyboardInterrupt(), 4, "interrupted"),
        (
            ZeroDivisionError("by\nzero"),
            1,
            "unexpected ZeroDivisionError: by; give the command again with --debug",
        ),
        (RuntimeError(), 1, "unexpected RuntimeError: no message"),
    ],
)
def test_whatever_goes_wrong_has_a_status_and_one_message(error, status, says):
    message, got = explain(error)
    assert got == status and says in message and "\n" not in message


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run will be, once `test_simulate...` has made it."""
    return tmp_path_factory.mktemp("cli") / "run"


@pytest.fixture
def config_file(tiny_config, tmp_path: Path, finished: Path) -> Path:
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(tiny_config(output=str(finished))))
    return path


@pytest.fixture
def run_dir(config_file: Path, finished: Path) -> Path:
    """A finished run; the first test that asks for it makes it."""
    if not (finished / "report.html").exists():
        assert main(["simulate", str(config_file)]) == 0
    return finished


def out_of(capsys, *arguments: str) -> str:
    capsys.readouterr()
    status = main(list(arguments))
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_simulate_ends_with_a_table_an_adapter_and_a_report(run_dir, config_file, capsys):
    for name in ("summary.json", "rounds.jsonl", "config.yaml", "report.html", "adapter/adapter_config.json"):
        assert (run_dir / name).exists(), name
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    for arguments in (["simulate", str(config_file)], ["resume", str(run_dir)]):
        text = out_of(capsys, *arguments)
        assert "finished already; nothing was done" in text
        assert "SIMULATION: not a guarantee" in text and "FedSVD" in text and str(run_dir / "adapter") in text
    changed = {path for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert {path.name for path in changed} <= {".lock"}
    summary = json.loads(out_of(capsys, "simulate", str(config_file), "--format", "json"))
    assert summary == json.loads((run_dir / "summary.json").read_text())


def test_simulate_leaves_a_directory_of_another_run_alone(run_dir, config_file, capsys):
    assert main(["simulate", str(config_file), "--set", "seed=8"]) == 2
    assert str(run_dir) in capsys.readouterr().err


def test_an_unfinished_run_is_not_started_again_but_resumed(run_dir, config_file, tmp_path, capsys):
    aside = run_dir / "summary.json.aside"
    (run_dir / "summary.json").rename(aside)
    try:
        assert main(["simulate", str(config_file)]) == 2
        assert f"fedlora resume {run_dir}" in capsys.readouterr().err
        assert json.loads(out_of(capsys, "status", str(run_dir), "--format", "json"))["finished"] is False
        out_of(capsys, "report", str(run_dir), "--to", str(tmp_path / "now.html"))
        told = out_of(capsys, "export", str(run_dir), "--to", str(tmp_path / "now"))
        assert "NOT FINISHED: this is the adapter of round " in told
        assert (tmp_path / "now" / "adapter_model.safetensors").exists() and (tmp_path / "now.html").exists()
    finally:
        aside.rename(run_dir / "summary.json")


def test_status_and_budget_agree_with_the_summary(run_dir, capsys):
    summary = json.loads((run_dir / "summary.json").read_text())
    status = json.loads(out_of(capsys, "status", str(run_dir), "--format", "json"))
    assert status["finished"] and status["rounds_completed"] == status["rounds"] == 3
    assert status["epsilon_max"] == summary["epsilon_max"] and status["score"] == summary["score"]
    rows = json.loads(out_of(capsys, "budget", str(run_dir), "--format", "json"))
    assert {row["client"]: row["epsilon"] for row in rows} == summary["epsilon_by_client"]
    assert "finished" in out_of(capsys, "status", str(run_dir))
    assert out_of(capsys, "budget", str(run_dir)).count("client-") == len(rows)


@pytest.mark.parametrize("name", ["afile", "afile/x", "/proc/x"])
def test_a_directory_that_cannot_hold_a_run_is_status_2_with_path_and_mend(
    name, config_file, tmp_path, capsys
):
    (tmp_path / "afile").write_text("mine")
    target = tmp_path / name
    for arguments in (["--run-dir", str(target)], ["--set", f"output={target}"]):
        assert main(["simulate", str(config_file), *arguments]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert str(target) in err and "choose another --run-dir or output" in err
    assert (tmp_path / "afile").read_text() == "mine"


def test_an_os_error_elsewhere_is_not_blamed_on_the_run_directory(tmp_path):
    other = OSError(13, "Permission denied", str(tmp_path / "data.tsv"))
    with pytest.raises(OSError, match="Permission denied"), usable(tmp_path / "run"):
        raise other
    with pytest.raises(ConfigError, match="No space left"), usable(tmp_path / "run"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["summary.json", "rounds.jsonl"])
@pytest.mark.parametrize("garbage", [b"{gar bage}\n", b"[]\n", b"\xff\xfe\n", b"{}\n"])
def test_a_damaged_file_of_a_run_is_named_with_status_2(run_dir, tmp_path, name, garbage, capsys):
    copied = tmp_path / "copied"
    shutil.copytree(run_dir, copied)
    (copied / name).write_bytes(garbage)
    for command in ("status", "report", "resume"):
        assert main([command, str(copied)]) == 2, command
        err = capsys.readouterr().err
        assert str(copied / name) in err and "damaged" in err and "restore it" in err


def test_what_no_ledger_tells_is_unknown_and_seeded_noise_a_simulation(run_dir, tmp_path, capsys):
    for command in ("status", "budget"):
        assert "SIMULATION: not a guarantee" in out_of(capsys, command, str(run_dir))
    copied = tmp_path / "copied"
    shutil.copytree(run_dir, copied)
    (copied / "summary.json").unlink()
    assert "unknown" not in out_of(capsys, "status", str(copied)) + out_of(capsys, "budget", str(copied))
    shutil.rmtree(copied / "ledgers")
    lines = out_of(capsys, "status", str(copied)).splitlines()
    line = next(line for line in lines if line.split()[:1] == ["epsilon"])
    assert line.split()[:2] == ["epsilon", "unknown"] and "SIMULATION" in line
    assert json.loads(out_of(capsys, "status", str(copied), "--format", "json"))["epsilon_max"] is None
    text = out_of(capsys, "budget", str(copied))
    assert "without a whole ledger" in text and "nodes report" not in text
    rows = json.loads(out_of(capsys, "budget", str(copied), "--format", "json"))
    answered = [row for row in rows if row["participations"]]
    assert answered and all(row["epsilon"] is None and row["left"] is None for row in answered)


def test_a_run_and_its_exported_adapter_score_the_same(run_dir, config_file, tmp_path, capsys):
    summary = json.loads((run_dir / "summary.json").read_text())
    to = tmp_path / "adapter"
    assert (
        json.loads(out_of(capsys, "export", str(run_dir), "--to", str(to), "--format", "json"))["merged"]
        is False
    )
    for path in (run_dir, to):
        found = json.loads(out_of(capsys, "evaluate", str(path), str(config_file), "--format", "json"))
        assert found["score"] == pytest.approx(summary["score"]) and found["examples"] == 90
    assert main(["export", str(run_dir), "--to", str(to)]) == 2
    other = ["evaluate", str(run_dir), str(config_file), "--set", "lora.r=3"]
    assert main(other) == 2 and "make them equal" in capsys.readouterr().err


def test_check_tells_what_a_run_would_be_and_writes_nothing(config_file, tmp_path, capsys):
    target = tmp_path / "unborn"
    arguments = ["check", str(config_file), "--set", f"output={target}"]
    found = json.loads(out_of(capsys, *arguments, "--format", "json"))
    assert len(found["clients"]) == 3 and found["trained_parameters"] > 0
    assert all(client["epsilon"] <= 8.0 for client in found["clients"])
    text, measured = out_of(capsys, *arguments), out_of(capsys, *arguments, "--measure")
    assert "noise, about" in text and "client-0" in text and not target.exists()
    assert "noise multiplier" in measured and "client-0" in measured and not target.exists()


def test_report_can_be_written_elsewhere(run_dir, tmp_path, capsys):
    to = tmp_path / "r.html"
    assert json.loads(out_of(capsys, "report", str(run_dir), "--to", str(to), "--format", "json")) == {
        "report": str(to)
    }
    assert to.read_text() == (run_dir / "report.html").read_text()
    assert main(["report", str(run_dir), "--to", str(tmp_path / "no" / "r.html")]) == 2


def _hear_sigint() -> None:
    """A shell's background jobs, and so their children, are born deaf to Ctrl-C; a terminal's are not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_at_any_other_moment_is_one_message_and_status_four(tmp_path):
    config = tmp_path / "run.yaml"
    os.mkfifo(config)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlora", "check", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_sigint,
    )
    writer = os.open(config, os.O_WRONLY)  # waits until the command is about to read
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 4 and out == ""
    assert err == "interrupted; nothing was lost, give the same command again\n"


@pytest.mark.parametrize("number", mostly_slow([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_who_is_told_to_stop_says_how_to_go_on_and_resume_ends_where_the_whole_run_would(
    number, config_file, tmp_path, capsys
):
    changes = ("federation.rounds=12", "federation.evaluate_every=12", "privacy.max_participations=12")
    longer = [word for change in changes for word in ("--set", change)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [
        sys.executable,
        "-m",
        "fedlora",
        "simulate",
        str(config_file),
        *longer,
        "--run-dir",
        str(broken),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_sigint,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not list(broken.glob("checkpoints/round-000002")):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4 and out == "", err
    assert err.splitlines()[-1].endswith(f"go on with: fedlora resume {broken}") and "Traceback" not in err
    out_of(capsys, "resume", str(broken))
    out_of(capsys, "simulate", str(config_file), *longer, "--run-dir", str(whole))
    states = [json.loads((path / "summary.json").read_text())["state_sha256"] for path in (broken, whole)]
    assert states[0] == states[1]
