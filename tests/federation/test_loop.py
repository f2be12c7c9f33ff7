"""The round loop leaves nothing open behind it, however it ends."""

import sqlite3
from pathlib import Path

import pytest

from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.store import Store
from fedlora.values import Origin
from tests.federation.answering import ones


class DiedError(Exception):
    """A client whose reply brings the server down."""


class Answering:
    """A Cohort whose clients answer at once; in round `dies`, one does and the next brings the server down."""

    def __init__(self, dies=None):
        self.dies = dies

    def ask(self, clients, request):
        for number, client in enumerate(clients):
            if number and request.round == self.dies:
                raise DiedError
            yield ones(client, request)

    def close(self):
        """Nothing is open."""


@pytest.fixture
def played(lab, tmp_path):
    """The loop of three rounds with a memory on disk, and that file; its store is kept, as a caller does."""
    stores = []

    def begin(dies=None):
        method = lab.method(beta=0.3)
        state, store = lab.start(method), Store(tmp_path)
        stores.append(store)
        store.begin(state, line_zero({}))
        loop = rounds(
            state, origin=Origin(run="run", base_model="", code=""), seed=7, members=lab.members(4),
            method=method, federation=lab.federation(rounds=3), cohort=Answering(dies), store=store,
            score=lambda adapters: {},
        )  # fmt: skip
        return loop, tmp_path / "memory.sqlite"

    return begin


def is_open(path):
    """Whether this process has the file, or what SQLite writes beside it, open."""
    held = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    return any(str(entry.readlink()).startswith(str(path)) for entry in held)


def require_free(path):
    """Somebody else may write to the file, at once."""
    assert not is_open(path)
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_once_the_last_round_is_done_the_memory_is_closed(played):
    loop, path = played()
    next(loop)
    assert is_open(path)
    assert len(list(loop)) == 2
    require_free(path)


def test_a_loop_that_nobody_goes_on_with_closes_the_memory(played):
    loop, path = played()
    next(loop)
    loop.close()
    require_free(path)


def test_an_error_in_mid_round_closes_the_memory_and_what_it_had_heard_never_was(played):
    loop, path = played(dies=2)
    next(loop)
    with pytest.raises(DiedError):
        next(loop)
    require_free(path)
    other = sqlite3.connect(path)
    assert {at for (at,) in other.execute("SELECT at FROM place")} == {1}
    other.close()
