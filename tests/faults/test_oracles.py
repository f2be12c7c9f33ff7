"""The judge of a run's remains finds out servers and nodes that are broken on purpose."""

from dataclasses import replace

import pytest

from fedlora.deploy.journal import Journal
from fedlora.federation import loop as loop_module
from fedlora.methods import mean as mean_module
from tests.faults.kills import keeps_nothing, records_nothing
from tests.faults.points import POINTS, around
from tests.faults.server import fixture_of_loaded, fixture_of_served
from tests.lanes import mostly_slow

loaded, served = fixture_of_loaded, fixture_of_served


def journals_nothing() -> None:
    around(Journal, "write", lambda real, journal, update, heard: None)


def adds_twice() -> None:
    around(mean_module, "applied", lambda real, adapters, step: real(real(adapters, step), step))


def asks_otherwise() -> None:
    def otherwise(real, *of):
        request = real(*of)
        return replace(request, work=replace(request.work, learning_rate=0.5 * request.work.learning_rate))

    around(loop_module, "request_of", otherwise)


def forgets_what_it_heard() -> None:
    around(Journal, "heard", lambda real, journal, number: [])


def nothing() -> None:
    """As it should be."""


# What is broken before the death and after it, and where the server dies.
BROKEN = {
    "journals nothing": (journals_nothing, journals_nothing, "S5 refactorised", "is not in the journal"),
    "adds an update twice": (adds_twice, adds_twice, "S5 refactorised", "played again, the journal ends in"),
    "asks otherwise then": (nothing, asks_otherwise, "S1 reply read", "round 2 was asked in two ways"),
    "forgets what it heard": (nothing, forgets_what_it_heard, "S2 reply journalled", "neither count nor are"),
    "nodes keep nothing": (keeps_nothing, keeps_nothing, "S1 reply read", "was released 2 times"),
    "nodes record nothing": (records_nothing, records_nothing, "S1 reply read", "its ledger does not hold"),
}


@pytest.mark.parametrize(
    "how", mostly_slow(BROKEN, "adds an update twice", "nodes keep nothing", "nodes record nothing")
)
def test_a_broken_federation_is_found_out(served, how):
    run = served()
    before, after, point, words = BROKEN[how]
    assert run.live(prepare=lambda: (before(), POINTS[point]())).killed
    run.live(prepare=after)
    found = run.violations()
    assert any(words in violation for violation in found), found


def test_a_directory_that_was_changed_is_found_out(served):
    run = served()
    assert run.live().status == 0
    assert run.violations() == []
    log = run.run_dir / "rounds.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:2], *lines[3:]]))
    (run.run_dir / ".half.part").touch()
    found = run.violations()
    assert any("rounds.jsonl has rounds [0, 1, 3]" in words for words in found)
    assert any("summary.json is not what lies" in words for words in found)
    assert ".half.part was left behind" in found
