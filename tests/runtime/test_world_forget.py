"""A client that withdraws while its reply is under way in a world; and a run that no late reply can hold up."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

from fedlora.cli.forget import erasers
from fedlora.disk import write_durably
from fedlora.errors import IncompleteError
from fedlora.runs import forgetting
from fedlora.runs.rundir import HOLDINGS, STATES
from fedlora.runtime.simulate import resume, simulate
from fedlora.runtime.world import clock as clock_module
from fedlora.runtime.world.clock import told
from fedlora.transport.wire import decode_reply, encode_reply
from tests.faults.kills import die

GONE = "client-0"
SPEEDS = {"client-0": 250, "client-1": 100, "client-2": 70}
AWAY = "client-0,0,100000\nclient-1,0,100000\nclient-2,0,205\nclient-2,450,100000\n"
"""In round 3, which begins at 200, client-0's reply to round 1 and client-1's are all that can come at once."""


class StoppedError(Exception):
    """A run that is interrupted after a round."""


def quiet(event: object) -> None:
    """Nothing is told."""


def stops_after(number):
    def listener(event):
        if type(event).__name__ == "RoundDone" and event.round["round"] == number:
            raise StoppedError

    return listener


@pytest.fixture
def config(tiny_config, tmp_path):
    (tmp_path / "speed.csv").write_text(
        "client,seconds\n" + "".join(f"{client},{seconds}\n" for client, seconds in SPEEDS.items())
    )
    (tmp_path / "trace.csv").write_text("client,from_s,until_s\n" + AWAY)

    def build(**changes):
        return tiny_config(
            **{
                "federation__cohort": {"probability": 1.0},
                "federation__deadline_s": 100.0,
                "federation__min_clients": 2,
                "federation__rounds": 4,
                "privacy": "none",
                "world": {
                    "availability": {"kind": "trace", "path": str(tmp_path / "trace.csv")},
                    "speed": {"kind": "file", "path": str(tmp_path / "speed.csv")},
                },
                **changes,
            }
        )

    return build


@pytest.fixture
def under_way(config, tmp_path):
    """Two rounds are done, and client-0's reply to the first is still under way."""
    with pytest.raises(StoppedError):
        simulate(config(), tmp_path / "run", stops_after(2))
    assert senders(tmp_path / "run") == [GONE]
    return tmp_path / "run"


def frames(run_dir):
    return sorted((run_dir / "world" / "replies").rglob("*.frame"))


def senders(run_dir):
    return [decode_reply(frame.read_bytes()).client for frame in frames(run_dir)]


def pending(run_dir):
    """By file of the world, whose errands it names."""
    return {
        path.name: [errand["client"] for errand in json.loads(path.read_text())["pending"]]
        for path in (run_dir / "world").glob("round-*.json")
    }


def forget(run_dir, client=GONE):
    return forgetting.forget(run_dir, client, erasers(run_dir))


def answered(run_dir):
    lines = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    assert not any(line["rejected"] for line in lines)
    return [line["answered"] for line in lines[1:]]


@pytest.mark.parametrize("erased", [True, False])
def test_a_run_goes_on_to_its_end_without_a_client_whose_reply_was_under_way(under_way, erased):
    """Also where the reply was left lying, as by an earlier version."""
    done = forgetting.forget(under_way, GONE, erasers(under_way) if erased else [])
    assert done.updates == erased
    assert senders(under_way) == ([] if erased else [GONE])
    assert any(GONE in clients for clients in pending(under_way).values()) != erased
    resume(under_way, quiet)
    # Round 3 waits for client-2, which is back at 450.
    assert answered(under_way) == [["client-1", "client-2"]] * 4
    assert told(under_way, 3)["virtual_s"] == 570.0
    assert frames(under_way) == []


def test_a_reply_too_old_for_the_gauges_does_not_hold_a_run_up_for_ever(config, tmp_path):
    run_dir = simulate(config(federation__keep_gauges=1), tmp_path / "run", quiet)
    assert told(run_dir, 3)["dropped"] == [GONE] and told(run_dir, 3)["late"] == {}
    assert answered(run_dir)[2] == ["client-0", "client-1", "client-2"]  # client-0 anew, with client-2
    again = tmp_path / "again"
    with pytest.raises(StoppedError):
        simulate(config(federation__keep_gauges=1), again, stops_after(3))
    (again / "checkpoints" / "round-000003" / "state.json").write_text("{")
    resume(again, quiet)  # round 3 is done once more, though the reply is gone
    assert answered(again) == answered(run_dir)
    assert [told(again, n) for n in (1, 2, 3, 4)] == [told(run_dir, n) for n in (1, 2, 3, 4)]


def test_a_finished_run_keeps_no_reply_that_came_too_late_for_it(config, tmp_path):
    run_dir = simulate(config(federation__rounds=2), tmp_path / "run", quiet)
    assert senders(run_dir) == [GONE]
    assert forget(run_dir).updates == 1
    assert frames(run_dir) == [] and not any(pending(run_dir).values())
    assert forget(run_dir).already


def test_replies_of_others_stay_and_what_no_round_waits_for_goes(under_way):
    (waiting,) = frames(under_way)
    reply = decode_reply(waiting.read_bytes())
    replies = {"1": encode_reply(replace(reply, client="client-1", round=3)), "2": waiting.read_bytes()[:-1]}
    for name, content in replies.items():  # killed in mid-round
        path = waiting.parent.with_name("round-000003") / f"{name}.frame"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert forget(under_way, "client-1").updates == 1
    assert frames(under_way) == [waiting]
    # Where a round killed twice left the reply of another than its file names.
    waiting.write_bytes(encode_reply(replace(reply, client="client-2")))
    forgetting.forget(under_way, "client-2", erasers(under_way))
    assert frames(under_way) == []


KILLS = {
    "first file": ("write_durably", 1),
    "last file": ("write_durably", 2),
    "frame gone": ("fsync", 1),
    "replies gone": ("erase_replies", 1),
}


def test_a_kill_while_replies_are_erased_and_the_command_again_ends_the_same(under_way, tmp_path):
    before = pending(under_way)
    assert [name for name, clients in sorted(before.items()) if GONE in clients] == [
        "round-000002.json",
        "round-000003.json",
    ]
    for point, (name, number) in KILLS.items():
        run_dir = tmp_path / point.replace(" ", "-")
        shutil.copytree(under_way, run_dir)
        child = os.fork()
        if child == 0:
            real, left = getattr(clock_module, name), [number]

            def step(*arguments, real=real, left=left):
                result = real(*arguments)
                left[0] -= 1
                if not left[0]:
                    die()
                return result

            setattr(clock_module, name, step)
            forget(run_dir)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point
        with pytest.raises(IncompleteError, match="forgotten by half"):
            resume(run_dir, quiet)
        if any(GONE in clients for clients in pending(run_dir).values()):
            assert senders(run_dir) == [GONE], point  # what a file names is there
        assert not forget(run_dir).already
        assert frames(run_dir) == [] and not any(pending(run_dir).values()), point


def test_what_an_interrupted_simulation_made_of_a_clients_records_goes(under_way):
    others = {"client-1", ".client-1.y3", f"{GONE}0", f".{GONE}0.z9"}
    for name in (GONE, f".{GONE}.x7f", *others):
        (under_way / STATES).mkdir(exist_ok=True)
        write_durably(under_way / STATES / name, b"states")
    (under_way / HOLDINGS).mkdir()
    (under_way / HOLDINGS / "input_ids.npy").write_bytes(b"records of all")
    forget(under_way)
    assert not (under_way / HOLDINGS).exists()
    assert {path.name for path in (under_way / STATES).iterdir()} == others
