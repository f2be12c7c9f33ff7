"""`fedlora compare` for real: two methods, two seeds, two budgets; interrupted, killed, gone on with."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.config.load import dump_config
from fedlora.config.schema import Runtime
from fedlora.runs.rundir import finished_summary, run_config
from fedlora.runtime.cluster import connected

PATIENCE_S = 300.0
SMALL = {
    "federation__rounds": 2,
    "federation__local_steps": 1,
    "data__partition": {"kind": "iid", "clients": 3},  # equal sizes: one noise to calibrate for each budget
}
WHAT = ["--methods", "fedsvd,ffa", "--seeds", "2", "--epsilons", "2,8", "--no-references"]
# One frozen layer, and draws enough that its states are kept for all cells.
SHARED = ["--set", "lora.layers_to_transform=[1]", "--set", "federation.batch_size=32"]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray, started once for all comparisons of this process, whose workers then need no second import of torch."""
    runtime = Runtime(kind="ray", workers=2)
    with connected(runtime, "tests", tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture
def config_file(tiny_config, tmp_path) -> Path:
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(tiny_config(**SMALL)))
    return path


def begun(arguments: list[str], said: Path) -> subprocess.Popen:
    """`fedlora compare` in a process group of its own; what it says goes to a file."""
    with said.open("wb") as file:
        command = [sys.executable, "-m", "fedlora", "compare", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def finished(directory: Path) -> dict[str, int]:
    """Names of the finished cells, and when they were."""
    return {path.parent.name: path.stat().st_mtime_ns for path in directory.glob("cells/*/summary.json")}


def wait_for(count: int, directory: Path, process: subprocess.Popen, said: Path) -> None:
    ends = time.monotonic() + PATIENCE_S
    while len(finished(directory)) < count:
        assert process.poll() is None and time.monotonic() < ends, said.read_text()
        time.sleep(0.02)


def wait_until_unlocked(directory: Path) -> None:
    """No worker of a killed comparison holds a cell any more."""
    ends = time.monotonic() + PATIENCE_S
    for lock in directory.glob("cells/*/.lock"):
        with lock.open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < ends, lock
                    time.sleep(0.02)


@pytest.mark.slow  # two comparisons of eight cells
def test_a_comparison_that_is_killed_goes_on_and_ends_as_one_that_is_left_alone(
    config_file, tmp_path, capfd, workers
):
    struck, whole, said = tmp_path / "struck", tmp_path / "whole", tmp_path / "said"
    arguments = [str(config_file), *WHAT, *SHARED, "--to", str(struck)]
    process = begun([*arguments, "--workers", "1"], said)
    wait_for(2, struck, process, said)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(PATIENCE_S)
    wait_until_unlocked(struck)
    kept = finished(struck)
    assert 2 <= len(kept) < 8
    assert len([path for path in (struck / ".states").iterdir() if path.suffix != ".lock"]) == 2

    assert main(["compare", *arguments, "--format", "json"]) == 0
    out, err = capfd.readouterr()
    told = re.search(r"^(\d) of 8 cells are finished already$", err, re.MULTILINE)
    assert told and "cell 8/8" in err
    assert len(kept) <= int(told[1]) < 8  # a dying worker may have ended one more
    assert {name: finished(struck)[name] for name in kept} == kept
    assert main(["compare", str(config_file), *WHAT, *SHARED, "--to", str(whole), "--format", "json"]) == 0
    assert (struck / "comparison.json").read_bytes() == (whole / "comparison.json").read_bytes()
    assert json.loads(out) == json.loads((whole / "comparison.json").read_text())
    _is_what_the_cells_say(json.loads(out), whole)
    assert not (struck / ".states").exists() and not (whole / ".states").exists()


@pytest.mark.slow
def test_a_comparison_that_is_interrupted_says_how_to_go_on_and_leaves_no_worker(config_file, tmp_path):
    to, said = tmp_path / "to", tmp_path / "said"
    process = begun([str(config_file), *WHAT, "--to", str(to)], said)
    wait_for(1, to, process, said)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 4
    assert "every finished round is kept, give the same command again: fedlora compare" in said.read_text()
    assert not (to / "comparison.json").exists()
    wait_until_unlocked(to)


def test_a_finished_comparison_is_told_again_and_one_of_another_config_refused(
    config_file, tmp_path, capfd, workers
):
    given = [
        str(config_file),
        "--methods",
        "ffa",
        "--seeds",
        "2",
        "--no-references",
        "--to",
        str(tmp_path / "to"),
    ]
    assert main(["compare", *given]) == 0
    first, _ = capfd.readouterr()
    assert "epsilon 8 at delta 1e-05, test accuracy, 2 seeds" in first and "SIMULATION" in first
    before = finished(tmp_path / "to")
    assert main(["compare", *given]) == 0
    again, err = capfd.readouterr()
    assert again == first and err == "2 of 2 cells are finished already\n"
    assert main(["compare", *given, "--set", "lora.r=1"]) == 2
    assert "lora.r is 2 there, 1 here" in capfd.readouterr().err
    assert finished(tmp_path / "to") == before


def _is_what_the_cells_say(found: dict, directory: Path) -> None:
    assert found["finished"] and found["epsilons"] == [2.0, 8.0] and found["seeds"] == [7, 8]
    for result in found["results"]:
        epsilon, arms = result["epsilon"], result["arms"]
        held: dict[str, list[float]] = {}
        for name, arm in arms.items():
            runs = [directory / "cells" / f"{name}-eps{epsilon:g}-seed{seed}" for seed in (7, 8)]
            summaries = [finished_summary(run) or {} for run in runs]
            held[name] = [summary["score"] for summary in summaries]
            assert arm["mean"] == pytest.approx(sum(held[name]) / 2)
            assert arm["epsilon_max"] == max(summary["epsilon_max"] for summary in summaries) <= epsilon
            configs = [run_config(run) for run in runs]
            assert [config.method.name for config in configs] == [name, name]
            assert [config.runtime.kind for config in configs] == ["local", "local"]
        difference = [a - b for a, b in zip(held["ffa"], held["fedsvd"], strict=True)]
        assert arms["ffa"]["paired"]["mean"] == pytest.approx(sum(difference) / 2)
        assert arms["fedsvd"]["paired"] is None
    page = (directory / "comparison.md").read_text()
    assert page.count("| fedsvd |") == page.count("| ffa |") == 2
    assert "<svg xmlns=" in (directory / "comparison.svg").read_text()


def test_a_cell_that_fails_is_told_and_the_others_go_on(config_file, tmp_path, capfd, workers):
    broken = "broken: lora.target_modules=[nowhere]"
    given = ["--methods", "ffa", "--arm", broken, "--seeds", "1", "--no-references", "--set", "privacy=none"]
    assert main(["compare", str(config_file), *given, "--to", str(tmp_path / "to"), "--format", "json"]) == 4
    out, err = capfd.readouterr()
    assert (
        "1 of 2 cells failed:" in err
        and "broken-epsnone-seed7: " in err
        and "give the same command again" in err
    )
    found = json.loads(out)
    assert not found["finished"]
    arms = found["results"][0]["arms"]
    assert arms["ffa"]["mean"] is not None and arms["ffa"]["interval"] is None
    assert arms["broken"]["mean"] is None


def test_arms_are_tuned_on_the_proxy_and_cells_have_what_was_chosen(
    config_file, tiny_config, topic_files, tmp_path, capfd, workers
):
    proxy, public = tmp_path / "proxy.yaml", tmp_path / "proxy.tsv"
    shutil.copy(topic_files[1], public)
    proxy.write_text(dump_config(tiny_config(**SMALL, data__train=str(public))))
    given = [
        "--methods",
        "ffa-head,config",
        "--seeds",
        "1",
        "--trials",
        "9",
        "--proxy",
        str(proxy),
        "--control",
    ]
    # So low a rate that two thirds are right, and of the largest nearly all: else nobody would see the choice used.
    rate = ["--set", "federation.optimizer.lr=0.04", "--set", "privacy=none", "--no-references"]
    steps = ["rounds=8", "evaluate_every=8", "local_steps=10", "cohort=3"]
    given += [*rate, *(word for step in steps for word in ("--set", f"federation.{step}"))]
    to = tmp_path / "to"
    assert main(["compare", str(config_file), *given, "--to", str(to), "--format", "json"]) == 0
    out, err = capfd.readouterr()
    tuning = json.loads(out)["tuning"]
    tried = tuning["arms"]["ffa-head"][0]["tried"]
    assert [trial["lr"] for trial in tried][:3] == [0.04, 0.02, 0.08] and len(tried) == 9
    best = max(tried, key=lambda trial: trial["score"])["lr"]
    assert best > 0.04
    assert tuning["arms"]["ffa-head"][0]["chosen"]["lr"] == best and list(tuning["arms"]) == [
        "ffa-head",
        "ffa-head-again",
    ]
    for name, rate in (("ffa-head", best), ("ffa-head-again", best), ("config", 0.04)):
        assert run_config(to / "cells" / f"{name}-epsnone-seed7").federation.optimizer.lr == rate
    for number, trial in enumerate(tried, 1):
        run = to / "trials" / f"ffa-head-trial{number}"
        assert run_config(run).data.train == str(public)
        assert (finished_summary(run) or {})["score"] == trial["score"]
    assert "of 9 trials the best is lr" in err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--methods", "fedsvt"], "'fedsvt' is not known; write fedsvd"),
        (["--methods", "ffa", "--trials", "2"], "--proxy PROXY.yaml"),
        (["--methods", "ffa", "--tune-on-data"], "no trials; write how many"),
        (["--methods", "ffa", "--epsilons", "1", "--set", "privacy=none"], "the config says privacy: none"),
        (["--methods", "ffa", "--epsilons", "one"], "'one' is no number"),
        (["--methods", "ffa", "--epsilons", "-1"], "arm ffa: --set privacy.target_epsilon=-1.0"),
        (["--methods", "ffa", "--against", "fedsb"], "it is not compared; write one of ffa"),
        (["--methods", ","], "nothing to compare"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_written(
    given, says, config_file, tmp_path, capsys
):
    before = sorted(tmp_path.iterdir())
    assert main(["compare", str(config_file), *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
