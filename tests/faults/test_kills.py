"""A node that is killed at any moment never sends what it has not paid for, and never two replies for one round.

Fifty random kills; all of them (`make faults`): FEDLORA_KILLS=500.
"""

import os
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from fedlora.privacy.outbox import Outbox
from fedlora.values import ClientUpdate, Refusal, RefusalReason
from tests.damage import flipped
from tests.faults.kills import (
    PARTICIPATIONS,
    POINTS,
    Heard,
    Site,
    keeps_nothing,
    knows_no_limit,
    never_pays,
    records_nothing,
    sends_first,
)

KILLS = int(os.environ.get("FEDLORA_KILLS", "50"))


@pytest.mark.fault("F24")
def test_a_reply_is_the_same_for_ever_and_a_refusal_costs_nothing_where_nobody_is_killed(new_site):
    site = new_site()
    first, again = site.ask(1), site.ask(1)
    assert isinstance(first.reply, ClientUpdate) and first.received == again.received
    assert len(site.contents().debits) == 1
    assert site.violations() == []


@pytest.mark.fault("F7", "F8", "F9", "F10", "F11")
def test_kills_at_random_moments_release_nothing_unpaid_and_nothing_twice(new_site, capsys):
    draw = random.Random(20261121)
    site, number, killed, paid = new_site(), 1, 0, 0
    first = site.ask(number)
    life, size = first.seconds, len(first.received)
    ends, phases = Counter[str](), Counter[str]()
    while killed < KILLS:
        # One in ten by what has been sent, since sending is the shortest part of a life.
        when = (
            {"kill_at": draw.randint(1, size)}
            if draw.random() < 0.1
            else {"kill_after": draw.uniform(0, 1.4 * life)}
        )
        before = left(site)
        heard = site.ask(number, **when)
        killed += heard.killed
        assert site.violations() == [], (killed, number)
        if heard.killed:
            phases[phase(heard, before, left(site))] += 1
            continue
        if isinstance(heard.reply, ClientUpdate):
            ends["answered"] += 1
            life = max(0.7 * life, heard.seconds)
        elif heard.reply.reason is RefusalReason.LEDGER:  # three attempts were paid and left no reply
            ends["given up"] += 1
        else:
            assert heard.reply.reason is RefusalReason.BUDGET
            ends["budget spent"] += 1
            assert len(site.contents().debits) == PARTICIPATIONS
            paid += PARTICIPATIONS
            site, number = new_site(), 0
        number += 1
    paid += len(site.contents().debits)
    with capsys.disabled():
        print(f"\n{killed} kills, {paid} attempts paid, 0 violations; {dict(ends)}; killed {dict(phases)}")
    assert ends["answered"] and ends["budget spent"] and phases.total() == killed
    assert {"before a debit", "in training", "while sending"} <= phases.keys()


def phase(heard: Heard, before: tuple[int, int, int], after: tuple[int, int, int]) -> str:
    """Where in its life a process was killed, as far as disk and tap tell."""
    if heard.received:
        return "while sending" if heard.reply is None else "when all was sent"
    if after == before:
        return "before a debit"
    return "in training" if after[1] == before[1] else "with the reply kept"


# Where a process dies, what it leaves on disk: debits, replies kept, releases recorded; and whether a byte was seen.
LEFT = {
    "C1 request received": (0, 0, 0, "nothing"),
    "C2 debit durable": (1, 0, 0, "nothing"),
    "C3 mid-training": (1, 0, 0, "nothing"),
    "C4 payload computed": (1, 0, 0, "nothing"),
    "C5 payload cached": (1, 1, 0, "nothing"),
    "C5b release recorded": (1, 1, 1, "nothing"),
    "C6 half sent": (1, 1, 1, "a part"),
    "C7 sent": (1, 1, 1, "all"),
}


def left(site: Site) -> tuple[int, int, int]:
    contents, outbox = site.contents(), Path(f"{site.config.ledger}.outbox")
    return (
        len(contents.debits) if contents else 0,
        len(list(outbox.glob("*.reply"))),
        len(contents.releases) if contents else 0,
    )


@pytest.mark.parametrize("point", list(POINTS))
@pytest.mark.fault("F7", "F8", "F9", "F10", "F11")
def test_a_kill_at_a_named_point_leaves_what_the_next_process_can_go_on_from(new_site, point):
    site = new_site()
    died = site.ask(1, prepare=POINTS[point])
    assert died.killed
    whole = isinstance(died.reply, ClientUpdate)
    seen = "all" if whole else "a part" if died.received else "nothing"
    assert (*left(site), seen) == LEFT[point]
    assert site.violations() == []

    debits, kept, _, _ = LEFT[point]
    again = site.ask(1)
    assert isinstance(again.reply, ClientUpdate)
    assert again.received.startswith(died.received)
    # What was kept is sent as it is; what was lost is paid for anew.
    assert left(site) == (debits + (not kept), 1, 1)
    assert again.reply.ledger.seq == (1 if kept else debits + 1)
    assert site.ask(1).received == again.received
    assert site.violations() == []


@pytest.mark.fault("F8")
def test_a_round_whose_every_attempt_is_killed_is_given_up_and_the_next_one_is_answered(new_site):
    site = new_site()
    for attempt in (1, 2, 3):
        assert site.ask(1, prepare=POINTS["C3 mid-training"]).killed
        assert left(site)[0] == attempt
    assert site.ask(1).reply == Refusal(client="site-0", run="r", round=1, reason=RefusalReason.LEDGER)
    assert left(site) == (3, 0, 0)
    assert isinstance(site.ask(2).reply, ClientUpdate)
    assert site.violations() == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (partial(Site.ask, behaviour=sends_first), "before it was paid"),
        (partial(Site.ask, behaviour=never_pays), "before it was paid"),
        (partial(Site.ask, prepare=keeps_nothing), "released twice"),
        (partial(Site.ask, prepare=records_nothing), "before it was paid and recorded"),
    ],
    ids=["sends before it pays", "never pays", "keeps nothing", "records nothing"],
)
@pytest.mark.fault("F8", "F9", "F10")
def test_a_node_with_its_steps_in_another_order_is_found_out(new_site, broken, words):
    site = new_site()
    broken(site, 1)
    broken(site, 1)
    assert any(words in violation for violation in site.violations())


def test_half_a_reply_that_no_ledger_holds_is_found_out(new_site):
    site = new_site()
    life = site.ask(1).seconds
    cut = site.ask(2, kill_after=10 * life, prepare=POINTS["C6 half sent"], behaviour=sends_first)
    assert cut.killed and cut.received and cut.reply is None
    assert any("bytes of no recorded reply" in violation for violation in site.violations())


def test_a_node_without_a_limit_is_found_out(new_site):
    site = new_site()
    for number in range(PARTICIPATIONS + 1):
        site.ask(number + 1, prepare=knows_no_limit)
    assert any("participations of 12" in violation for violation in site.violations())


@pytest.mark.fault("F10")
def test_a_reply_that_changed_on_disk_is_not_sent(new_site):
    site = new_site()
    assert site.ask(1, prepare=POINTS["C5b release recorded"]).killed
    (path,) = Path(f"{site.config.ledger}.outbox").glob("*.reply")
    kept = Outbox(path.parent).find("r", 1)
    path.write_bytes(flipped(path.read_bytes()))
    assert kept is not None
    assert isinstance(site.ask(1).reply, Refusal)
    assert site.violations() == []
