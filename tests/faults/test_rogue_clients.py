"""Nothing that a client sends stops a server, is run by it, or is in the model unless it could be an update."""

import logging
import math
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_to_proto

from fedlora.algebra.deltas import joint_norm
from fedlora.deploy.soundness import DRAWS, SPREAD
from fedlora.errors import WireError
from fedlora.transport import flower_cohort
from fedlora.transport.flower_client import Hello, hello_content, hello_of
from fedlora.values import Witness
from tests.faults import rogues
from tests.faults.grid import Fate, Wire
from tests.faults.points import around
from tests.faults.rogues import array, arrives, moved, records, says, sends, spent
from tests.faults.server import Served, fixture_of_loaded, fixture_of_served
from tests.faults.test_server_nodes import line, models, update

loaded, served = fixture_of_loaded, fixture_of_served

ROGUE, HONEST = "site-0", "site-1"
AT_ONCE = 5
"""Faults in one run: each has a round, and between two an honest one."""


def in_turn(names: Sequence[str]) -> list[tuple[str, ...]]:
    """The faults of each run."""
    return [tuple(names[start : start + AT_ONCE]) for start in range(0, len(names), AT_ONCE)]


def log_of(run: Served) -> Path:
    """What the server of `finished` says."""
    return run.folder / "log"


def finished(run: Served, prepare: Callable[[], object] = lambda: None) -> None:
    """The run is, and its log is in a file."""

    def logged() -> None:
        logging.basicConfig(level=logging.DEBUG, force=True, filename=log_of(run))
        prepare()

    life = run.live(prepare=logged)
    assert life.status == 0, life.error


def listed(run: Served, number: int) -> str:
    """What rounds.jsonl says of the rogue in that round: a code, a reason or nothing."""
    found = line(run, number)
    return {**found["refused"], **found["rejected"]}.get(ROGUE, "")


def require_dropped(served: Any, fates: Mapping[str, Fate], codes: Mapping[str, str], **how: Any) -> Served:
    """Each fate meets the rogue's reply in a round of its own, is listed by its code, and leaves no trace else."""
    run = served(federation__rounds=2 * len(fates) + 1)
    rounds = dict(zip(fates, range(2, 2 * len(fates) + 1, 2), strict=True))
    run.wire.fates |= {(1, rounds[name]): fate for name, fate in fates.items()}
    finished(run, **how)
    assert run.violations() == []
    for name, number in rounds.items():
        assert codes[name] in listed(run, number), name
        assert line(run, number)["answered"] == [HONEST], name
        assert line(run, number + 1)["answered"] == [ROGUE, HONEST], name
    assert run.undisturbed(absent={(1, number) for number in rounds.values()}) == run.state()
    return run


def malformed(served: Any, fates: Mapping[str, Fate], **how: Any) -> Served:
    return require_dropped(served, fates, dict.fromkeys(fates, "malformed"), **how)


@pytest.mark.fault("F26")
@pytest.mark.parametrize("names", in_turn(list(rogues.DAMAGED)), ids="; ".join)
def test_a_damaged_frame_is_dropped_whole(served, names):
    malformed(served, {name: sends(rogues.DAMAGED[name]) for name in names})


@pytest.mark.fault("F27")
@pytest.mark.parametrize("names", in_turn(list(rogues.UNREADABLE)), ids="; ".join)
def test_a_frame_that_no_node_writes_is_dropped_whole(served, names):
    malformed(served, {name: sends(rogues.UNREADABLE[name]) for name in names})


@pytest.mark.fault("F27", "F31")
@pytest.mark.parametrize("names", in_turn(list(rogues.UNFIT)), ids="; ".join)
def test_an_update_that_cannot_count_is_dropped_whole(served, names):
    fates = {name: sends(rogues.UNFIT[name][0]) for name in names}
    require_dropped(served, fates, {name: rogues.UNFIT[name][1] for name in names})


NO_FRAME = {
    "no record": lambda frame: RecordDict(),
    "a frame in another record": lambda frame: RecordDict({"other": records(frame=array(frame))["fedlora"]}),
    "a frame of another name": lambda frame: records(other=array(frame)),
    "another serialisation": lambda frame: records(frame=array(frame, "numpy.ndarray")),
    "a frame as config": lambda frame: RecordDict({"fedlora": ConfigRecord({"frame": frame})}),
}


@pytest.mark.fault("F26")
def test_a_message_without_a_frame_is_dropped(served):
    malformed(served, {name: arrives(content) for name, content in NO_FRAME.items()})


@pytest.mark.fault("F26")
def test_of_a_message_only_its_frame_is_read(served):
    run = served()
    other = moved(lambda tensor: 1000 * tensor)

    def with_another(frame: bytes) -> RecordDict:
        found = records(frame=array(frame), another=array(other(frame)))
        found["config"] = ConfigRecord({"round": 3})
        return found

    run.wire.fates[1, 2] = arrives(with_another)
    finished(run)
    assert run.violations() == [] and line(run, 2)["answered"] == [ROGUE, HONEST]
    assert run.undisturbed() == run.state()


@pytest.mark.fault("F26")
def test_words_in_an_error_of_flower_are_in_no_file_of_the_server(served):
    run = served()
    words = "patient 4711 has it"
    error = Error(code=8, reason=words)
    run.wire.fates[1, 2] = lambda asked, reply: [Message(error, reply_to=asked)]
    finished(run, prepare=lambda: setattr(flower_cohort, "AGAIN_S", 0.05))
    assert run.violations() == [] and listed(run, 2) == "failed"
    assert run.undisturbed(absent={(1, 2)}) == run.state()
    assert told(run, words) == [] and "Flower's error 8" in log_of(run).read_text()


def told(run: Served, words: str) -> list[str]:
    """The files of the server, beside the replies themselves, that have these words; its log too."""
    files = [path for path in run.run_dir.rglob("*") if path.is_file() and path.suffix != ".frame"]
    return [path.name for path in [*files, log_of(run)] if words.encode() in path.read_bytes()]


@pytest.mark.fault("F23", "F27")
@pytest.mark.parametrize("what", ["run", "tensor"])
def test_a_clients_own_words_are_in_no_line_of_the_rounds(served, what):
    run, words = served(), "A patient has it"
    named = rogues.with_update(rogues.renamed(words))
    run.wire.fates[1, 2] = sends(says(run=words) if what == "run" else named)
    finished(run)
    assert listed(run, 2)
    assert "rounds.jsonl" not in told(run, words)


@pytest.mark.fault("F22")
def test_other_bytes_for_a_round_that_was_answered_are_refused_with_an_alarm(served):
    fates = {"round 1 again": sends(says(round=1))}
    run = require_dropped(served, fates, {"round 1 again": "ledger"})
    log = log_of(run).read_text()
    assert "ERROR" in log and "site-0: its ledger cannot be trusted" in log and "released twice" in log


NO_COUNT = [10**18, 10**9 + 1, 0, -1, 1.0, math.inf, "9", None]


@pytest.mark.fault("F31")
@pytest.mark.parametrize("count", [*NO_COUNT, True])
def test_a_hello_with_a_number_of_records_that_cannot_be_is_refused(count):
    with pytest.raises(WireError, match="run the same fedlora on both ends"):
        hello_of(hello(count))


def hello(count: Any) -> RecordDict:
    found = hello_content(Hello(client="rogue", records=9, classes=("kitchen", "music", "weather")))
    words = {**found["fedlora"], "records": count}
    return RecordDict({"fedlora": ConfigRecord({n: v for n, v in words.items() if v is not None})})


@pytest.mark.fault("F31")
def test_who_declares_what_cannot_be_is_no_member_and_the_run_begins_without_it(served):
    run = served()
    run.wire.nodes = {**run.wire.nodes, 3: run.wire.nodes[1]}
    run.wire.fates[3, 0] = arrives_hello(10**18)
    finished(run)
    assert run.violations() == [] and run.undisturbed() == run.state()
    assert {found.node for found in run.tape.read("asked") if found.round} == {1, 2}


def arrives_hello(count: int) -> Fate:
    return lambda asked, reply: [Message(hello(count), reply_to=asked)]


@pytest.mark.fault("F29")
@pytest.mark.parametrize("kind", ["pickle", "numpy", "torch"])
def test_nothing_that_a_client_sends_is_run(served, tmp_path, kind):
    mark, seen = tmp_path / "mark", tmp_path / "seen"
    data = rogues.executables(mark)[kind]

    def hook(event: str, arguments: Any) -> None:
        if (event == "pickle.find_class" and arguments[1] == "mkdir") or event == "numpy.load":
            seen.touch()

    fates = {name: arrives(content) for name, content in rogues.as_messages(kind, data).items()}
    malformed(served, fates, prepare=lambda: sys.addaudithook(hook))
    assert not mark.exists() and not seen.exists()
    if kind == "pickle":
        pickle.loads(data)
        assert mark.exists()  # it would have shown


def bound(run: Served, sent: Any) -> float:
    """The greatest length of an update that says it spent that."""
    federation, (event,) = run.config.federation, sent.spent
    unit = federation.optimizer.lr * run.config.privacy.max_grad_norm / event.expected_batch
    numbers = sum(t.numel() for named in (sent.delta.sites, sent.delta.head) for t in named.values())
    drawn = event.steps * event.expected_batch
    noise = event.noise_multiplier * math.sqrt(event.steps * numbers)
    return unit * ((1 + SPREAD) * noise + drawn + DRAWS * (math.sqrt(drawn) + 1))


@pytest.mark.fault("F31", "F32")
@pytest.mark.parametrize("factor", [-1.0, -1.3, 1.3])
def test_a_rogue_within_the_band_moves_the_model_by_its_share_of_the_bound_and_no_more(served, factor):
    run = served(clients=3, method={"name": "ffa"}, federation__rounds=1)
    for rogue in (1, 2):
        run.wire.fates[rogue, 1] = sends(moved(lambda tensor: factor * tensor))
    finished(run)
    assert run.violations() == [] and line(run, 1)["answered"] == ["site-0", "site-1", "site-2"]
    before, after = models(run)
    mine = update(run, 3, 1)
    squares = 0.0
    for site, factors in before.sites.items():
        squares += float((after.sites[site].b - factors.b - mine.delta.sites[site] / 3).norm()) ** 2
    for name, tensor in before.head.items():
        squares += float((after.head[name] - tensor - mine.delta.head[name] / 3).norm()) ** 2
    moved_by, most = math.sqrt(squares), 2 / 3 * bound(run, mine)
    theirs = [abs(factor) * joint_norm(update(run, rogue, 1).delta) for rogue in (1, 2)]
    assert 0 < moved_by <= most and moved_by <= sum(theirs) / 3 * (1 + 1e-4)


STOPS: dict[str, Any] = {
    "a batch of no records": spent(expected_batch=0.0),
    "a batch of less than none": spent(expected_batch=-1.0),
    "a batch without a cap": spent(max_draw=None),
    "numbers whose products are infinite": moved(
        lambda tensor: torch.full_like(tensor, 3e38), expected_batch=None, max_draw=None
    ),
    "a digest that is no text": says(ledger=Witness(seq=3, head="\ud800")),
}


@pytest.mark.fault("F27", "F31")
@pytest.mark.parametrize("what", list(STOPS))
def test_a_server_outlives_whatever_an_update_says(served, what):
    run = served()
    run.wire.fates[1, 2] = sends(STOPS[what])

    def as_bytes(real: Any, *arguments: Any) -> Any:
        message_to_proto(arguments[-1]).SerializeToString()  # as it leaves for a SuperLink
        return real(*arguments)

    life = run.live(prepare=lambda: around(Wire, "_push", as_bytes))
    run.settle()
    assert life.status == 0, life.error


@pytest.mark.fault("F31")
def test_who_does_not_say_what_it_drew_cannot_send_any_length(served):
    loud = sends(moved(lambda tensor: 1000 * tensor, expected_batch=None, max_draw=None))
    require_dropped(served, {"loud": loud}, {"loud": "unsound"})
