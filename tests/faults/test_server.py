"""A server that dies and is started again ends in the model of one that never died, with the same replies."""

import hashlib
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import TypeAlias

import pytest

from fedlora.deploy import server as server_module
from fedlora.disk import whole_lines
from fedlora.federation.store import Store
from fedlora.runs.rundir import SPENT
from tests.faults.kills import die, dies_after
from tests.faults.points import BEGINNING, POINTS, around, no_memory_left
from tests.faults.server import Life, Served, fixture_of_loaded, fixture_of_served
from tests.lanes import mostly_slow

KILLS = min(20, int(os.environ.get("FEDLORA_KILLS", "8")))
ROUNDS = 10 if KILLS == 20 else 4

loaded, served = fixture_of_loaded, fixture_of_served


def finished(run: Served) -> list[str]:
    """What is wrong with a run that nothing should have harmed, beyond `violations`."""
    found = run.violations()
    if (there := run.state()) != (calm := run.undisturbed()):
        found.append(f"it ended in {there}, undisturbed in {calm}")
    journalled = {line["payload"] for line in whole_lines(run.run_dir / SPENT)}
    for key, frames in run.updates().items():
        found += [
            f"{key} was lost" for frame in frames if hashlib.sha256(frame).hexdigest() not in journalled
        ]
    rounds = range(1, run.config.federation.rounds + 1)
    wanted = {(number, round_) for number in run.nodes for round_ in rounds}
    found += [f"{key} was never released" for key in sorted(wanted - run.updates().keys())]
    return found


def asked(run: Served) -> Counter[tuple[int, int]]:
    """How often each node was asked in each round."""
    return Counter((found.node, found.round) for found in run.tape.read("asked") if found.round)


def journalled(run: Served) -> set[tuple[int, int]]:
    """By node and round, what is in the journal."""
    numbers = {node.config.client: number for number, node in run.nodes.items()}
    return {(numbers[line["client"]], line["round"]) for line in whole_lines(run.run_dir / SPENT)}


Left: TypeAlias = tuple[int, int, int, int, bool]


def left(run: Served) -> Left:
    """Newest plan, updates in the journal, newest checkpoint, newest line, whether a checkpoint lies half done."""
    plans = sorted((run.run_dir / "plans").glob("*.json"))
    state, _ = Store(run.run_dir).load()
    lines = whole_lines(run.run_dir / "rounds.jsonl")
    part = any((run.run_dir / "checkpoints").glob(".*.part"))
    return int(plans[-1].stem[-6:]), len(journalled(run)), state.round, lines[-1]["round"], part


def in_mid_round(run: Served) -> Left:
    """As `left`, where the other node may have been heard or not: it waits for its turn if it is heard first."""
    plan, heard, *rest = left(run)
    return plan, min(heard, 3), *rest


LEFT = {
    "S0 plan saved": (2, 2, 1, 1, False),
    "S1 reply read": (2, 2, 1, 1, False),
    "S1b bytes stored": (2, 2, 1, 1, False),
    "S2 reply journalled": (2, 3, 1, 1, False),
    "S3 acknowledged": (2, 2, 1, 1, False),
    "S4 first of two in the sums": (2, 3, 1, 1, False),
    "S4b sums closed": (2, 4, 1, 1, False),
    "S5 refactorised": (2, 4, 1, 1, False),
    "S5b first of two remembered": (2, 3, 1, 1, False),
    "S5c memory stored": (2, 4, 1, 1, False),
    "S6 checkpoint aside": (2, 4, 1, 1, True),
    "S7 renamed": (2, 4, 2, 1, False),
    "S8 line written": (2, 4, 2, 2, False),
}


@pytest.mark.fault("F2", "F3", "F4", "F5", "F44")
@pytest.mark.parametrize(
    "point",
    mostly_slow(POINTS, "S1 reply read", "S2 reply journalled", "S4 first of two in the sums", "S7 renamed"),
)
def test_a_server_that_dies_at_a_named_point_goes_on_from_what_is_on_disk(served, point):
    run = served()
    assert run.live(prepare=POINTS[point]).killed
    run.settle()
    assert (in_mid_round if "first of two" in point else left)(run) == LEFT[point]
    known, before = journalled(run), asked(run)
    life = run.live()
    assert life.status == 0, life.error
    assert finished(run) == []
    # What is in the journal is asked of nobody again; what was heard and lost is asked again and not paid again.
    after = asked(run)
    assert all(after[key] == before[key] for key in known)
    assert all(count == 1 + (key in before and key not in known) for key, count in after.items())


@pytest.mark.fault("F5")
@pytest.mark.parametrize("point", mostly_slow(BEGINNING, "first checkpoint"))
def test_a_server_that_dies_before_the_first_round_begins_the_same_run(served, point):
    run = served()
    assert run.live(prepare=BEGINNING[point]).killed
    roster = (run.run_dir / "roster.json").read_text()
    assert not run.updates()
    life = run.live()
    assert life.status == 0, life.error
    assert (run.run_dir / "roster.json").read_text() == roster
    assert finished(run) == []


@pytest.mark.fault("F1")
@pytest.mark.parametrize("waits", [True, False], ids=["until they have finished", "not at all"])
def test_what_nodes_finish_while_the_server_is_dead_is_accepted_once(served, waits):
    run = served()
    # Nothing of round 2 arrives, so the server can die at no better time.
    never = {(number, 2): lambda: False for number in run.nodes}
    life = run.live(
        prepare=lambda: run.wire.holds.update(never), kill_when=lambda: {(1, 2), (2, 2)} <= asked(run).keys()
    )
    assert life.killed and not journalled(run) & never.keys()
    if waits:
        run.settle()
        assert never.keys() <= run.updates().keys()
    life = run.live()
    assert life.status == 0, life.error
    assert finished(run) == []
    assert {asked(run)[key] for key in never} == {2}


@pytest.mark.slow
@pytest.mark.fault("F6")
def test_a_server_killed_at_random_moments_ends_in_the_model_of_one_that_was_not(served, capsys):
    draw, killed, moments = random.Random(20261121), 0, Counter[str]()
    while killed < KILLS:
        run = served(federation__rounds=ROUNDS, name=f"run-{killed}")
        status = None
        while status != 0:
            life = at_a_random_moment(run, draw) if killed < KILLS else run.live()
            status = life.status
            killed += life.killed
            assert life.killed or status == 0, life.error
            if life.killed and (run.run_dir / "checkpoints").exists():
                moments[f"round {left(run)[2]}" if (run.run_dir / "plans").exists() else "beginning"] += 1
        assert finished(run) == [], killed
    with capsys.disabled():
        print(
            f"\n{killed} kills of a server, 0 violations; newest checkpoints: {dict(sorted(moments.items()))}"
        )
    assert len(moments) > 1


def at_a_random_moment(run: Served, draw: random.Random) -> Life:
    """One life in four is killed while the server starts, every other one some messages and a moment later.

    By messages and not by time alone, so that a busy machine gets as far as an idle one.
    """
    if draw.random() < 0.25:
        return run.live(kill_after=draw.uniform(0, 1.0))
    run.tape.path.touch()
    tape, messages = run.tape.path.open("rb"), draw.randint(1, 16)
    tape.seek(0, os.SEEK_END)
    wait, due = draw.uniform(0, 0.15), None

    def is_time() -> bool:
        nonlocal messages, due
        messages -= tape.read().count(b"\n")
        if due is None and messages <= 0:
            due = time.monotonic() + wait
        return due is not None and time.monotonic() >= due

    with tape:
        return run.live(kill_when=is_time)


@pytest.mark.fault("F44")
def test_a_server_that_runs_out_of_memory_in_an_aggregation_does_it_again_from_the_journal(served):
    run = served()
    life = run.live(prepare=no_memory_left)
    assert life.status == 1 and "MemoryError" in life.error
    assert left(run) == LEFT["S4b sums closed"]
    before = asked(run)
    assert run.live().status == 0
    assert finished(run) == []
    assert all(count == 1 for count in asked(run).values()) and before.keys() <= asked(run).keys()


@pytest.mark.fault("F51")
def test_the_summary_of_a_server_that_died_before_writing_it_is_the_one_it_would_have_written(served):
    run = served()
    aside = run.folder / "would have been"

    def dies(real, path: Path, summary) -> None:
        aside.write_text(json.dumps(summary))
        die()

    assert run.live(prepare=lambda: around(server_module, "write_summary", dies)).killed
    assert not (run.run_dir / "summary.json").exists()
    before = asked(run)
    assert run.live().status == 0
    assert json.loads((run.run_dir / "summary.json").read_text()) == json.loads(aside.read_text())
    assert asked(run) == before
    assert finished(run) == []


@pytest.mark.fault("F51")
def test_a_finished_run_that_is_started_again_asks_nobody_and_changes_nothing(served):
    run = served()
    assert run.live(prepare=lambda: dies_after(server_module, "write_summary")).killed
    files = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
    greeted = len(run.tape.read("asked"))
    assert run.live().status == 0
    assert {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()} == files
    assert len(run.tape.read("asked")) == greeted
    assert finished(run) == []
