"""Whole runs in a world: who pays, whose reply counts when, and that no interruption shows."""

import json
import os
from pathlib import Path

import pytest

from fedlora.config.load import _computed, config_digest
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.events import Listener
from fedlora.privacy.ledger_format import parse
from fedlora.runs.rundir import run_rounds
from fedlora.runtime.check.measured import preview
from fedlora.runtime.simulate import resume, simulate
from fedlora.runtime.world.clock import told

SPEED = {"kind": "lognormal", "median_s": 60.0, "sigma": 1.0, "round_sigma": 0.3}
WORLD = {
    "availability": {"kind": "drop-outs", "groups": 3, "mean_up_s": 400.0, "mean_down_s": 100.0},
    "speed": SPEED,
    "stragglers": {"share": 0.2, "factor": 3.0},
}
SLOW = pytest.mark.slow  # a run for each
BEGUN = 8
"""Durable writes by which a new directory holds a run that can be resumed."""
LIVELY = {
    "data__partition": {"kind": "iid", "clients": 6},
    "federation__cohort": 4,
    "federation__rounds": 6,
    "federation__deadline_s": 90.0,
    "federation__local_steps": 1,
    "federation__batch_size": 8,
    "privacy__max_participations": 6,
    "privacy__accountant": "rdp",
    "world": WORLD,
}


SMALL = {"federation__cohort": 3, "federation__deadline_s": 100.0, "privacy__accountant": "rdp"}


def quiet(event: object) -> None:
    """Nothing is told."""


def state(run_dir: Path) -> str:
    return json.loads((run_dir / "summary.json").read_text())["state_sha256"]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()][1:]


def paid(run_dir: Path) -> dict[str, list[int]]:
    """By client, the rounds in its ledger; only clients that have one."""
    return {
        path.stem: [debit.round for debit in parse(path.read_bytes(), path).debits]
        for path in (run_dir / "ledgers").iterdir()
    }


def trace(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "trace.csv"
    path.write_text("client,from_s,until_s\n" + text)
    return {"kind": "trace", "path": str(path)}


def speeds(tmp_path: Path, *seconds: float) -> dict:
    path = tmp_path / "speed.csv"
    path.write_text("client,seconds\n" + "".join(f"client-{n},{s}\n" for n, s in enumerate(seconds)))
    return {"kind": "file", "path": str(path)}


def test_a_run_without_a_world_keeps_its_name(tiny_config):
    assert "world" not in _computed(tiny_config())
    assert config_digest(tiny_config()) != config_digest(tiny_config(world={}))


def test_who_is_away_pays_nothing_and_who_is_late_or_lost_has_paid(tiny_config, tmp_path):
    text = "client-0,0,1000\nclient-1,500,1000\nclient-2,0,20\nclient-2,300,1000\n"
    world = {"availability": trace(tmp_path, text), "speed": speeds(tmp_path, 250, 10, 30)}
    config = tiny_config(**SMALL, world=world)
    with pytest.raises(RuntimeError):
        simulate(config, tmp_path / "run", stop_after(1))
    # Round 1: client-0 is late, and heard beyond the deadline since the round needs one; client-2 was lost.
    (line,) = lines(tmp_path / "run")
    assert line["answered"] == ["client-0"]
    assert paid(tmp_path / "run") == {"client-0": [1], "client-2": [1]}
    assert told(tmp_path / "run", 1)["away"] == ["client-1"]


def stop_after(round_: int) -> Listener:
    def listener(event: object) -> None:
        if type(event).__name__ == "RoundDone" and event.round["round"] == round_:
            raise RuntimeError("stopped")

    return listener


def test_a_late_reply_counts_in_the_round_it_arrives_in_with_its_staleness_told(tiny_config, tmp_path):
    world = {"speed": speeds(tmp_path, 250, 100, 70)}
    config = tiny_config(**SMALL, federation__rounds=4, privacy__max_participations=4, world=world)
    run_dir = simulate(config, tmp_path / "run", quiet)
    assert [line["answered"] for line in lines(run_dir)] == [
        ["client-1", "client-2"],
        ["client-1", "client-2"],
        ["client-0", "client-1", "client-2"],
        ["client-1", "client-2"],
    ]
    assert told(run_dir, 3)["late"] == {"client-0": {"rounds": 2, "seconds": 300.0}}
    assert [line.get("world") for line in run_rounds(run_dir)[3:4]] == [told(run_dir, 3)]
    assert [told(run_dir, n)["virtual_s"] for n in (1, 2, 3, 4)] == [100.0, 200.0, 300.0, 400.0]
    assert [told(run_dir, n)["busy"] for n in (1, 2, 3, 4)] == [[], ["client-0"], ["client-0"], []]
    assert paid(run_dir) == {"client-0": [1, 4], "client-1": [1, 2, 3, 4], "client-2": [1, 2, 3, 4]}


def test_a_late_reply_of_another_basis_moves_the_model_as_the_gauges_carry_it(tiny_config, tmp_path, caplog):
    world = {"speed": speeds(tmp_path, 250, 100, 70)}
    heard = simulate(tiny_config(**SMALL, world=world), tmp_path / "heard", quiet)
    few = simulate(tiny_config(**SMALL, world=world, federation__keep_gauges=1), tmp_path / "few", quiet)
    assert lines(heard)[2]["rejected"] == {}
    assert lines(few)[2]["answered"] == ["client-1", "client-2"] and lines(few)[2]["rejected"] == {}
    assert told(few, 3)["dropped"] == ["client-0"] and told(few, 3)["late"] == {}
    assert "client-0 to round 1 counts no more: trained in basis 0, gauges reach back to 1" in caplog.text
    assert not (few / "world" / "replies" / "round-000001" / "0.frame").exists()


def test_with_enough_the_fast_end_the_round(tiny_config, tmp_path):
    world = {"speed": speeds(tmp_path, 40, 10, 20)}
    config = tiny_config(**SMALL, federation__enough=2, world=world)
    run_dir = simulate(config, tmp_path / "run", quiet)
    assert [line["answered"] for line in lines(run_dir)] == [
        ["client-1", "client-2"],
        ["client-0", "client-1"],  # 20 to 40: client-1 is back at 30, client-0 at 40 as client-2
        ["client-1", "client-2"],
    ]
    assert [told(run_dir, n)["virtual_s"] for n in (1, 2, 3)] == [20.0, 40.0, 50.0]


class Dies:
    """In place of os.fsync: a process that is killed as it is about to make its n-th write durable."""

    def __init__(self, at: int | None = None) -> None:
        self.fsync, self.at, self.writes = os.fsync, at, 0

    def __call__(self, descriptor: int) -> None:
        self.writes += 1
        if self.writes == self.at:
            raise KeyboardInterrupt
        self.fsync(descriptor)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(tiny_config, place, monkeypatch) -> Path:
    """The run that nobody interrupts; beside it, how many durable writes it took."""
    if not (place / "writes").exists():
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", counts := Dies())
            simulate(tiny_config(**LIVELY), place / "run", quiet)
        (place / "writes").write_text(str(counts.writes))
    return place / "run"


def test_the_run_that_is_interrupted_below_meets_every_fate(whole):
    found = [told(whole, n) for n in range(1, 7)]
    for fate in ("late", "away", "busy", "lost"):
        assert any(moment[fate] for moment in found), fate


@pytest.mark.parametrize("at", [0.35, 0.6, 0.85, *(pytest.param(n / 40, marks=SLOW) for n in range(40))])
def test_stopped_at_any_durable_write_and_resumed_it_is_the_same_run(
    tiny_config, tmp_path, whole, monkeypatch, at
):
    writes = int((whole.parent / "writes").read_text())
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", Dies(BEGUN + int(at * (writes - BEGUN))))
        with pytest.raises(KeyboardInterrupt):
            simulate(tiny_config(**LIVELY), tmp_path / "cut", quiet)
    cut = resume(tmp_path / "cut", quiet)
    assert (state(cut), paid(cut)) == (state(whole), paid(whole))
    assert [told(cut, n) for n in range(1, 7)] == [told(whole, n) for n in range(1, 7)]


def test_a_round_done_again_after_its_replies_were_heard_is_the_same(tiny_config, tmp_path, whole):
    """The newest checkpoint is found damaged, so the round before it is the last."""
    for round_ in (2, 4):
        run_dir = tmp_path / f"cut-{round_}"
        with pytest.raises(RuntimeError):
            simulate(tiny_config(**LIVELY), run_dir, stop_after(round_))
        (run_dir / "checkpoints" / f"round-{round_:06d}" / "state.json").write_text("{")
        assert state(resume(run_dir, quiet)) == state(whole)


@SLOW  # Ray starts twice
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_meets_the_same_world(tiny_config, tmp_path, whole, workers):
    import ray

    config = tiny_config(**LIVELY, runtime={"kind": "ray", "workers": workers})
    try:
        spread = simulate(config, tmp_path / "ray", quiet)
    finally:
        ray.shutdown()
    assert (state(spread), paid(spread)) == (state(whole), paid(whole))


def test_replies_on_their_way_lie_on_disk_until_nobody_can_ask_for_them(whole):
    """Those that round 5 or 6 began with, and those that the last round left."""
    pending = [
        errand
        for begins in (5, 6, 7)
        for errand in json.loads((whole / "world" / f"round-{begins:06d}.json").read_text())["pending"]
        if errand["arrives"]
    ]
    replies = whole / "world" / "replies"
    left = {str(path.relative_to(replies)) for path in replies.glob("*/*.frame")}
    on_their_way = {f"round-{e['round']:06d}/{e['number']}.frame" for e in pending}
    assert on_their_way and left == on_their_way


def test_a_clock_that_is_gone_stops_the_run(tiny_config, tmp_path):
    import shutil

    run_dir = tmp_path / "run"
    with pytest.raises(RuntimeError):
        simulate(tiny_config(world={"speed": SPEED}), run_dir, stop_after(1))
    shutil.move(run_dir / "world", tmp_path / "aside")
    with pytest.raises(IncompleteError, match="but 1 rounds are done; restore it"):
        resume(run_dir, quiet)


def test_a_trace_that_was_changed_in_mid_run_is_another_world(tiny_config, tmp_path):
    config = tiny_config(world={"speed": speeds(tmp_path, 250, 100, 70)})
    with pytest.raises(RuntimeError):
        simulate(config, tmp_path / "run", stop_after(1))
    speeds(tmp_path, 250, 100, 71)
    with pytest.raises(ConfigError, match="another trace or speed file"):
        resume(tmp_path / "run", quiet)


def test_a_trace_that_cannot_be_read_leaves_no_directory(tiny_config, tmp_path):
    config = tiny_config(world={"availability": {"kind": "trace", "path": str(tmp_path / "none.csv")}})
    with pytest.raises(ConfigError, match=r"none\.csv: cannot be read"):
        simulate(config, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_flower_has_no_virtual_clock(tiny_config):
    with pytest.raises(ConfigError, match=r"world: runtime\.kind is flower, whose seconds are real"):
        tiny_config(world={}, runtime={"kind": "flower"})


def test_the_preview_says_what_the_run_will_meet(tiny_config, tmp_path):
    world = {"speed": speeds(tmp_path, 250, 100, 70)}
    config = tiny_config(**SMALL, federation__rounds=4, world=world)
    (note,) = [note for note in preview(config, quiet).notes if "in this world" in note]
    assert "75% of those asked answer, 8% in a later round, 0% go away at work" in note
    assert "0.1 virtual hours" in note


def test_the_preview_says_that_a_world_never_lets_a_round_end(tiny_config, tmp_path):
    far = trace(tmp_path, "".join(f"client-{n},1e12,2e12\n" for n in range(3)))
    found = preview(tiny_config(world={"availability": far}, federation__deadline_s=1.0), quiet)
    assert any("the world never lets round 1 end" in note for note in found.notes)
