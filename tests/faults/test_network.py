"""A node whose link is cut, held, slow or one-way: rounds go on, and what it has paid for is counted once."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.deploy.processes import free_port
from tests.faults.proxy import BOTH
from tests.faults.running import ATTEMPTS, NEAR, OTHER, Running, started

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_encoder, topic_files) -> Iterator[Running]:
    yield from started(tmp_path_factory.mktemp("network"), tiny_encoder, topic_files)


@pytest.fixture
def running(federation) -> Iterator[Running]:
    """As it is before and after each fault: nothing is broken."""
    assert federation.violations() == []
    yield federation
    federation.fleet.heal()
    assert federation.violations() == []


@pytest.mark.fault("F14")
def test_a_round_whose_instruction_does_not_arrive_ends_without_the_node_and_without_a_debit(running):
    for _ in range(ATTEMPTS):
        missed = running.settle() + 1
        running.fleet.hold()
        running.wait(lambda missed=missed: running.committed() >= missed)
        if missed not in running.paid():
            break
        running.fleet.heal()
    assert missed not in running.paid() and missed in running.paid(OTHER)
    assert running.lines()[missed]["answered"] == ["node-2"]
    running.fleet.heal()
    # The instruction waited at the SuperLink: the node works on it now, and pays, and its answer is a late one.
    running.wait(lambda: missed in running.heard())
    assert running.heard()[missed] > missed
    running.goes_on()


@pytest.mark.fault("F15")
def test_an_answer_that_a_partition_holds_up_until_before_the_deadline_counts_in_its_own_round(running):
    for _ in range(ATTEMPTS):
        number = running.struck(b"/v1/fleet/push-messages", held=BOTH)
        running.wait(lambda number=number: number in running.heard(OTHER))
        assert number not in running.heard()
        running.fleet.heal()
        running.wait(lambda number=number: number in running.heard() and running.committed() >= number)
        if running.heard()[number] == number:  # a busy machine may have been too late for this deadline
            break
    assert running.heard()[number] == number
    assert running.lines()[number]["answered"] == ["node-1", "node-2"]
    assert running.lines()[number]["rejected"] == {}


@pytest.mark.fault("F16")
def test_an_answer_that_comes_after_the_deadline_belongs_to_a_later_round_as_of_its_own(running):
    number = running.struck(b"/v1/fleet/push-messages", held=BOTH)
    running.wait(lambda: running.committed() >= number)
    running.fleet.heal()
    assert running.lines()[number]["answered"] == ["node-2"]
    running.wait(lambda: number in running.heard() and running.committed() >= running.heard()[number])
    later = running.heard()[number]
    assert later > number and "node-1" in running.lines()[later]["answered"]
    # It counts, unless the node answered the later round too: of each node the newest update does.
    surplus = f"update of round {number} came with one of round {later}"
    newer = running.heard().get(later) == later
    assert running.lines()[later]["rejected"] == ({"node-1": surplus} if newer else {})
    running.goes_on()


@pytest.mark.fault("F18")
def test_a_link_that_comes_and_goes_lets_rounds_through_and_is_not_beaten_with_retries(running):
    newest, made, flaps = running.committed() + 1, running.fleet.accepted, 0

    def done() -> bool:
        return sum(number > newest for number in running.heard()) >= 2

    while not done():
        assert flaps < 40, running.federation.processes.logs()
        running.fleet.hold()
        running.within(2, done)
        running.fleet.heal()
        running.within(2, done)
        flaps += 1
    assert running.fleet.accepted - made <= 5 * (flaps + 1)


@pytest.mark.fault("F19")
def test_a_slow_link_is_not_taken_for_a_dead_node(running):
    newest = running.settle()
    (frame, *_) = [*(running.federation.run_dir / "replies").iterdir()]
    server = running.federation.run_dir / "server.log"
    before = server.read_text()
    # An answer takes a second, and what HTTP wraps around it some more.
    running.fleet.slow(frame.stat().st_size)
    running.wait(lambda: any(number > newest + 1 for number in running.heard()))
    running.fleet.heal()
    assert "Flower's error" not in server.read_text()[len(before) :]
    running.goes_on()


@pytest.mark.fault("F20")
def test_a_node_that_stands_still_beyond_the_deadline_is_late_and_not_lost(running):
    for _ in range(ATTEMPTS):
        missed = running.settle() + 1
        group = running.federation.processes.started[f"executor-{NEAR}"].pid
        os.killpg(group, signal.SIGSTOP)
        running.wait(lambda missed=missed: running.committed() >= missed)
        os.killpg(group, signal.SIGCONT)
        if running.lines()[missed]["answered"] == ["node-2"]:
            break
    running.wait(lambda: missed in running.heard())
    assert running.heard()[missed] > missed
    running.goes_on()


@pytest.mark.fault("F52")
def test_a_superlink_that_moves_to_another_port_is_found_by_its_name_and_knows_its_run(running):
    federation = running.federation
    federation.kill("link")
    federation.link = free_port()
    federation.start_link()
    for proxy in (running.fleet, running.control):
        proxy.retarget(federation.link)
    running.goes_on(rounds=2)
    assert federation.said().count("submitted, in series") == 1


@pytest.mark.fault("F17")
@pytest.mark.parametrize("request_", ["push-messages", "push-object"])
def test_an_answer_whose_receipts_are_lost_keeps_nobody_waiting_and_counts_once_at_most(running, request_):
    number = running.struck(f"/v1/fleet/{request_}".encode(), lost=["down"])
    made = running.fleet.accepted
    running.fleet.reset()
    running.wait(lambda: running.fleet.accepted > made)
    running.fleet.heal()
    running.fleet.reset()
    # Flower takes what is sent again for a duplicate, and asks for the bytes of neither.
    running.goes_on(OTHER)
    assert running.committed() >= number in running.released()
    # The node itself is reached again once Flower has given that reply up, or when its SuperNode starts anew.
    running.restart(f"supernode-{NEAR}")
    running.goes_on()


@pytest.mark.fault("F14", "F15", "F16", "F17", "F18", "F19", "F20", "F52")
def test_after_all_bad_links_the_journal_gives_the_same_model_bit_for_bit(federation):
    federation.end()
    assert federation.violations() == []
    assert federation.replays()
