"""A disk that is full where the ledger or the reply must go: nothing is sent that was not recorded."""

import errno
import os
import resource
from collections.abc import Callable

import pytest

from fedlora.privacy.outbox import Outbox
from fedlora.training import client as client_module
from fedlora.values import ClientUpdate, Refusal, RefusalReason
from tests.faults.kills import POINTS, Site


def files_of_at_most(size: int) -> Callable[[], None]:
    """No file of the process grows beyond `size` bytes; a write is cut off there, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def never_trains() -> None:
    def trained(*anything: object) -> None:
        raise AssertionError("a record was touched")

    client_module._local_steps = trained


@pytest.mark.parametrize("room", [0, 1, 100])
@pytest.mark.fault("F33")
def test_no_room_for_the_debit_and_nothing_is_trained(new_site, room):
    site = new_site()
    assert isinstance(site.ask(1).reply, ClientUpdate)
    before = site.ledger.read_bytes()

    def full() -> None:
        never_trains()
        files_of_at_most(len(before) + room)()

    found = site.ask(2, prepare=full)
    assert isinstance(found.reply, Refusal) and found.reply.reason is RefusalReason.LEDGER
    assert site.ledger.read_bytes() == before
    assert isinstance(site.ask(2).reply, ClientUpdate)  # there is room again
    assert site.violations() == []


@pytest.mark.fault("F33")
def test_no_room_for_a_ledger_and_nothing_is_trained(new_site):
    site = new_site()
    found = site.ask(1, prepare=lambda: (never_trains(), files_of_at_most(10)()))
    assert isinstance(found.reply, Refusal) and found.reply.reason is RefusalReason.LEDGER
    assert site.contents() is None
    assert isinstance(site.ask(1).reply, ClientUpdate)


@pytest.mark.fault("F34")
def test_no_room_for_the_reply_and_the_attempt_is_paid_but_nothing_sent(new_site):
    site = new_site()
    found = site.ask(1, prepare=files_of_at_most(2000))  # the ledger fits in, the reply does not
    assert isinstance(found.reply, Refusal) and found.reply.reason is RefusalReason.FAILED
    assert len(site.contents().debits) == 1 and not site.contents().releases
    again = site.ask(1)
    assert isinstance(again.reply, ClientUpdate) and len(site.contents().debits) == 2
    assert site.violations() == []


@pytest.mark.fault("F34")
def test_no_room_for_the_release_and_the_reply_waits_for_it(new_site):
    site = new_site()
    size = len(_ledger_after_a_debit(new_site()))
    found = site.ask(1, prepare=lambda: _small_ledger(site, size + 20))
    assert isinstance(found.reply, Refusal) and found.reply.reason is RefusalReason.LEDGER
    assert len(site.contents().debits) == 1 and not site.contents().releases
    again = site.ask(1)
    assert isinstance(again.reply, ClientUpdate) and len(site.contents().debits) == 1
    assert site.violations() == []


def _ledger_after_a_debit(site: Site) -> bytes:
    site.ask(1, prepare=POINTS["C2 debit durable"])
    return site.ledger.read_bytes()


def _small_ledger(site: Site, size: int) -> None:
    """Only once the reply is kept, which is longer."""
    real = Outbox.keep

    def kept(self: Outbox, reply: object) -> None:
        real(self, reply)
        files_of_at_most(size)()

    Outbox.keep = kept


def sync_fails(at: int) -> None:
    """The `at`-th fsync of the process fails, as on a dying disk; those after it pretend that all is well."""
    real, left = os.fsync, [at]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    os.fsync = fsync


# Outbox folder, key, its folder, header, its folder, debit, reply, its folder, release.
@pytest.mark.parametrize(("at", "debits"), [*((at, 0) for at in range(1, 7)), (7, 1), (8, 1), (9, 1)])
@pytest.mark.fault("F36")
def test_an_fsync_that_fails_is_not_taken_for_done(new_site, at, debits):
    site = new_site()
    found = site.ask(1, prepare=lambda: sync_fails(at))
    assert isinstance(found.reply, Refusal)
    contents = site.contents()
    assert (len(contents.debits) if contents else 0) == debits
    again = site.ask(1)
    assert isinstance(again.reply, ClientUpdate)
    # Only where training was paid and its reply is not there, it is paid again.
    assert len(site.contents().debits) == (2 if at == 7 else 1)
    assert site.violations() == []
