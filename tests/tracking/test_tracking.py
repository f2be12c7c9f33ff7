"""A tracker is told every round once, whatever dies in between, and never stops a run."""

import json
import logging
import struct
import threading
import time

import pytest

from fedlora.config.load import config_digest
from fedlora.errors import ConfigError, GuardError
from fedlora.federation.events import RoundDone, RunDone, RunStarted
from fedlora.privacy import gaussian
from fedlora.runtime.simulate import resume, simulate
from fedlora.tracking import telling
from fedlora.tracking.figures import figures, told_config, told_summary
from fedlora.tracking.telling import Telling, require_trackers
from fedlora.tracking.tracker import Tracked
from tests.lanes import mostly_slow

LINE = {
    "round": 3, "asked": ["a", "b", "c"], "answered": ["a", "b"], "refused": {"c": "budget"}, "rejected": {},
    "accuracy_told": {}, "metric": "accuracy", "score": 0.5, "loss": 1.25, "epsilon_max": 2.0, "seconds": 4.5,
    "update_norm": {"a": 5.0, "b": 3.0}, "noise_norm": {"a": 4.0, "b": 3.0}, "public_clip_share": 0.75,
}  # fmt: skip


def test_figures_are_those_of_the_line_and_name_nobody():
    assert figures(LINE) == {
        "test/accuracy": 0.5, "test/loss": 1.25, "epsilon_max": 2.0, "clients/asked": 3, "clients/answered": 2,
        "clients/refused": 1, "clients/rejected": 0, "seconds": 4.5, "public_clip_share": 0.75,
        "update_norm": 4.0, "noise_norm": 3.5, "signal_to_noise": pytest.approx(9 / 25),
    }  # fmt: skip
    unscored = {**LINE, "metric": None, "score": None, "loss": None, "epsilon_max": None, "update_norm": {}}
    del unscored["noise_norm"], unscored["public_clip_share"]
    assert set(figures(unscored)) == {
        "clients/asked", "clients/answered", "clients/refused", "clients/rejected", "seconds"
    }  # fmt: skip


def test_neither_config_nor_summary_names_a_client(tiny_config):
    config = tiny_config(federation__cohort={"probability": {f"client-{n}": 0.5 for n in range(3)}})
    words = json.dumps(told_config(config))
    assert "client-0" not in words and "of 3 clients" in words and config.output not in words
    ranked = tiny_config(federation__ranks={"client-0": 1})
    assert "client-0" not in json.dumps(told_config(ranked))
    chances = {f"client-{n}": 0.5 for n in range(3)}
    uneven = tiny_config(world={"availability": {"kind": "uneven", "probability": chances}})
    assert "client-0" not in json.dumps(told_config(uneven))
    assert told_summary({"score": 0.5, "participations": {"client-0": 3}, "private": True}) == {
        "score": 0.5,
        "private": True,
    }


def test_who_is_told_does_not_change_which_run_it_is(tiny_config):
    assert config_digest(tiny_config()) == config_digest(tiny_config(tracking=["jsonl", "wandb"]))


def test_a_missing_package_is_named_with_its_extra_before_anything_is_written(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(telling.PACKAGES, "wandb", "no_such_package_of_anybody")
    config = tiny_config(tracking=["wandb"])
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[wandb\]'"):
        simulate(config, tmp_path / "run", lambda event: None)
    assert not (tmp_path / "run").exists()
    require_trackers(["jsonl"])


class Kept:
    """A tracker in this process. It fails in the rounds that it is told to."""

    def __init__(self, fails=()):
        self.fails, self.rounds, self.ended, self.opened = set(fails), [], [], []

    def open(self, run_dir, config, have):
        self.opened.append(have)
        return self, have

    def round(self, number, found):
        if number in self.fails:
            raise ConnectionError("the network is gone")
        self.rounds.append(number)

    def finish(self, summary):
        self.ended.append(summary)

    def close(self, *, finished):
        self.ended.append(finished)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A place for the run that all of these tests tell of."""
    return tmp_path_factory.mktemp("told") / "run"


@pytest.fixture
def run(finished, tiny_config):
    config = tiny_config(privacy="none")
    if not (finished / "summary.json").exists():
        simulate(config, finished, lambda event: None)
    mark = finished / "tracking" / "kept.json"
    mark.unlink(missing_ok=True)
    lines = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    return finished, config, lines


def tell(kept, run, events):
    run_dir, config, _ = run
    telling = Telling("kept", run_dir, config, kept.open)
    for event in events:
        telling(event)
    telling.hang_up()
    telling.wait(20)
    return json.loads((run_dir / "tracking" / "kept.json").read_text())


def started(run):
    return RunStarted(clients=3, rounds=3, private=False, run_dir=run[0])


def test_a_tracker_gets_what_it_missed_and_nothing_twice(run):
    kept = Kept()
    done = [RoundDone(round=line, eta_s=None) for line in run[2]]
    mark = tell(kept, run, [started(run), *done, RunDone(summary={"score": 1.0})])
    assert kept.rounds == [0, 1, 2, 3] and kept.ended == [{"score": 1.0}, True] and mark["told"] == 3
    again = Kept()
    tell(again, run, [started(run), *done])
    assert again.rounds == [] and again.ended == [False]
    assert again.opened == [Tracked(run=mark["run"], told=3)]


def test_a_tracker_that_fails_says_so_once_and_later_gets_the_rest(run, caplog):
    broken = Kept(fails={2})
    with caplog.at_level(logging.WARNING):
        mark = tell(broken, run, [started(run), *[RoundDone(round=line, eta_s=None) for line in run[2]]])
    assert broken.rounds == [0, 1] and mark["told"] == 1
    said = [record.getMessage() for record in caplog.records if record.name == telling.__name__]
    assert said == [
        "tracking: kept failed (ConnectionError: the network is gone); the run goes on without it, and rounds.jsonl "
        "has everything"
    ]
    mended = Kept()
    tell(mended, run, [started(run)])
    assert mended.rounds == [2, 3]


def test_trackers_that_hang_together_hold_the_end_up_no_longer_than_one(tiny_config, tmp_path, monkeypatch):
    free = threading.Event()

    def stuck(run_dir, config, have):
        free.wait(60)
        raise RuntimeError("nobody waits for it")

    monkeypatch.setattr(telling, "opener", lambda name: stuck)
    monkeypatch.setattr(telling, "PATIENCE_S", 1.0)
    config = tiny_config(tracking=["tensorboard", "wandb", "mlflow"])
    with telling.tracked(config, tmp_path, lambda event: None) as tell:
        tell(RunStarted(clients=1, rounds=1, private=True, run_dir=tmp_path))
        began = time.monotonic()
    assert time.monotonic() - began < 2.5
    free.set()


def test_a_tracker_that_hangs_holds_nobody_up(run, caplog):
    stuck = threading.Event()

    class Hanging(Kept):
        def round(self, number, found):
            stuck.wait(30)

    telling = Telling("kept", run[0], run[1], Hanging().open)
    telling(started(run))
    telling.hang_up()
    with caplog.at_level(logging.WARNING):
        telling.wait(0.2)
    assert "takes no end" in caplog.text
    stuck.set()
    telling.wait(20)


def read_tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_mlflow(run_dir):
    from mlflow import MlflowClient

    client, run = MlflowClient(), json.loads((run_dir / "tracking" / "mlflow.json").read_text())["run"]
    held = client.get_run(run)
    assert held.info.status == "FINISHED" and held.data.params["federation.optimizer.lr"] == "1.0"
    assert held.data.tags["fedlora.rounds_completed"] == "3"
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run, name)] for name in held.data.metrics
    }


def read_wandb(run_dir):
    """Of both processes' offline files, as `wandb sync` sends them: of one run, a step of it once."""
    found, ids = {}, set()
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in ended(path):
            if record.run.run_id:
                ids.add(record.run.run_id)
            for item in record.history.item:
                values = found.setdefault(item.key or ".".join(item.nested_key), [])
                values.append((record.history.step.num, json.loads(item.value_json)))
    assert ids == {json.loads((run_dir / "tracking" / "wandb.json").read_text())["run"]}
    return found


def ended(path, patience_s=60.0):
    """All records of a run that was finished: W&B's service writes the last of them after `finish` has returned."""
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + patience_s
    while True:
        records = [Record.FromString(record) for record in logged(path.read_bytes())]
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < until, f"{path} has {len(records)} records and no end"
        time.sleep(0.02)


def logged(content, block=32768):
    """Records of a log in LevelDB's format after 7 bytes of W&B's own; the package's reader is no Python any more."""
    at, parts = 7, []
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if at + 7 + length > len(content):
            return  # not all of it is written yet
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield b"".join(parts)
            parts = []


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}


@pytest.mark.parametrize("name", mostly_slow(READERS, "tensorboard", "wandb"))
def test_the_packages_own_reader_finds_each_round_of_an_interrupted_run_once(
    tiny_config, tmp_path, monkeypatch, name
):
    """The noise gets lost in the second round; mended, the run goes on in the same run of the tracker."""
    pytest.importorskip(telling.PACKAGES[name])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    config, run_dir = tiny_config(tracking=["jsonl", name]), tmp_path / "run"

    def lose_it(event):
        if isinstance(event, RoundDone) and event.round["round"] == 1:
            monkeypatch.setattr(gaussian, "_noise_like", lambda total, *more: 0 * total)

    noise = gaussian._noise_like
    with pytest.raises(
        GuardError, match=r"round 2: 'client-\d' sent an update in which .* makes it longer than"
    ):
        simulate(config, run_dir, lose_it)
    monkeypatch.setattr(gaussian, "_noise_like", noise)
    resume(run_dir, lambda event: None)
    lines = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert all(0 <= line["public_clip_share"] <= 1 for line in lines)
    found = READERS[name](run_dir)
    for key in ("test/accuracy", "test/loss", "epsilon_max", "clients/answered", "public_clip_share"):
        assert [step for step, _ in found[key]] == [0, 1, 2, 3], key
        values = [value for _, value in found[key]]
        assert values == pytest.approx([figures(line)[key] for line in lines], rel=1e-6), key


def test_a_run_of_wandbs_that_the_process_has_open_besides_is_left_alone(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from fedlora.tracking.wandb import open_wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    users = wandb.init(project="mine", dir=str(tmp_path))
    tracker, _ = open_wandb(tmp_path, {}, Tracked(run="of-ours", told=-1))
    tracker.round(0, {"test/loss": 1.0})
    tracker.close(finished=True)
    users.log({"own": 2.0})
    users.finish()
    keys = {}
    for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        items = [item for record in ended(path) for item in record.history.item]
        keys[path.stem.removeprefix("run-")] = {item.key or ".".join(item.nested_key) for item in items}
    assert "own" in keys[users.id] and "test/loss" not in keys[users.id]
    assert "test/loss" in keys["of-ours"] and "own" not in keys["of-ours"]
