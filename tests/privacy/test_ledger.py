"""What was spent stays spent: in new processes, asked again, in parallel and after a kill."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from hashlib import sha256

import pytest

from fedlora.errors import LedgerError, PrivacyError
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget, would_exceed
from fedlora.privacy.calibration import noise_multiplier
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.sampling import poisson
from fedlora.privacy.step import spent as spent_steps
from fedlora.values import Mechanism

from .ledgers import BUDGET, EVENT, TOLD, debit, opened, spending


@pytest.fixture
def spent(tmp_path):
    return spending(tmp_path / "node" / "ledger.jsonl")


def test_a_new_process_reads_the_same_spending(spent):
    again = opened(spent.path)
    assert again.debits == spent.debits == read_ledger(spent.path).debits
    assert [entry.seq for entry in again.debits] == [1, 3, 4, 5]
    assert again.events[3].noise_multiplier == 0.1 + 0.7  # exactly: floats are written as their repr
    assert again.events[4] == TOLD
    assert again.find("r", 5) == spent.debits[2] and again.find("r", 3) is None and again.find("q", 5) is None
    assert [again.released(each) for each in again.debits] == ["a" * 64, None, None, None]
    assert epsilon(again.events, 1e-5) == epsilon(spent.events, 1e-5) > 0
    assert oct(spent.path.stat().st_mode & 0o777) == "0o600"


def test_lines_are_what_the_format_says(spent):
    lines = spent.path.read_text().splitlines()
    header, first, second = (json.loads(line) for line in lines[:3])
    del header["digest"], first["digest"], second["digest"]
    assert header == {
        "format": "fedlora-ledger",
        "version": 2,
        "unit": "record",
        "adjacency": "zero-out",
        "client": "client-3",
        "dataset": "f" * 64,
        "noise": "seeded",
        "seq": 0,
    }
    assert first == {
        "kind": "debit",
        "seq": 1,
        "run": "r",
        "round": 1,
        "attempt": 1,
        "request": "d",
        "events": [
            {
                "noise_multiplier": 1.1,
                "sample_rate": 0.02,
                "steps": 10,
                "expected_batch": 20.0,
                "max_draw": 123,
            }
        ],
        "max_grad_norm": 1.0,
        "noise": "seeded",
        "prev": sha256(lines[0].encode()).hexdigest(),
    }
    assert second == {
        "kind": "release",
        "seq": 2,
        "debit": 1,
        "payload": "a" * 64,
        "prev": sha256(lines[1].encode()).hexdigest(),
    }
    assert "epsilon" not in spent.path.read_text()


def test_one_debit_releases_one_reply(spent):
    first, second = spent.debits[:2]
    before = spent.path.read_bytes()
    spent.release(first, "a" * 64)  # the same bytes again are the same release
    assert spent.path.read_bytes() == before
    with pytest.raises(LedgerError, match=r"debit 1 has released a+, now b+; send what was released"):
        spent.release(first, "b" * 64)
    with pytest.raises(LedgerError, match="is not in it"):
        spent.release(replace(second, round=77), "b" * 64)
    assert spent.path.read_bytes() == before


def test_the_same_request_is_paid_once_and_another_one_is_refused(spent):
    before = spent.path.read_bytes()
    assert debit(spent, 5) == spent.debits[2]
    longer = replace(EVENT, steps=11)
    for events, changed in (
        ((), {"digest": "e"}),
        ((), {"bound": 2.0}),
        ((longer,), {}),
        ((EVENT, TOLD), {}),
    ):
        with pytest.raises(LedgerError, match="one round is answered once"):
            debit(spent, 5, *events, **changed)
    assert spent.path.read_bytes() == before
    debit(spent, 5, run="another")  # another run is another release
    assert len(opened(spent.path).debits) == 5


def test_noise_that_cannot_be_repeated_is_paid_again_and_not_for_ever(tmp_path):
    ledger = opened(tmp_path / "l", noise="os-entropy")
    attempts = [debit(ledger, 1) for _ in range(3)]
    assert [(each.seq, each.attempt) for each in attempts] == [(1, 1), (2, 2), (3, 3)]
    assert ledger.find("r", 1) == attempts[-1]
    with pytest.raises(LedgerError, match="was paid 3 times and left no reply"):
        debit(ledger, 1)
    assert len(opened(ledger.path, noise="os-entropy").debits) == 3
    debit(ledger, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"noise_multiplier": 1},
        {"noise_multiplier": float("inf")},
        {"sample_rate": 1.5},
        {"max_draw": None},
        {"bound": 0.0},
        {"round": 9.0},
        {"run": None},
    ],
)
def test_what_would_not_read_back_is_not_written(spent, wrong):
    before = spent.path.read_bytes()
    event = {name: value for name, value in wrong.items() if hasattr(EVENT, name)}
    asked = {name: value for name, value in wrong.items() if name not in event}
    with pytest.raises(PrivacyError):
        debit(spent, asked.pop("round", 9), replace(EVENT, **event), **asked)
    assert spent.path.read_bytes() == before


def test_participations_end_at_their_maximum(tmp_path):
    budget = replace(BUDGET, max_participations=3)
    ledger = opened(tmp_path / "l")
    for round in range(3):
        assert not would_exceed([(EVENT,)] * round, (EVENT,), budget)
        debit(ledger, round, budget=budget)
    assert would_exceed([(EVENT,)] * 3, (EVENT,), budget)
    for _ in range(2):
        with pytest.raises(PrivacyError, match="3 participations are spent"):
            debit(opened(ledger.path), 3, budget=budget)
    assert debit(ledger, 2, budget=budget).seq == 3  # what was paid may be asked again
    assert len(opened(ledger.path).debits) == 3


@pytest.mark.parametrize("participations", [3])
def test_calibrated_noise_lasts_exactly_as_long_as_agreed(participations):
    sampling = poisson(20, 1000)
    sigma = noise_multiplier(3.0, 1e-5, sampling, 10 * participations)
    event = spent_steps(Mechanism(max_grad_norm=1.0, noise_multiplier=sigma), sampling, 10)
    budget = Budget(
        target_epsilon=3.0, target_delta=1e-5, max_participations=participations, accountant="pld"
    )
    answers = [would_exceed([(event,)] * done, (event,), budget) for done in range(participations + 1)]
    assert answers == [False] * participations + [True]


def test_epsilon_ends_it_before_the_count_does():
    """Right for ledgers of one mechanism with too little noise for all participations, and for mixed ones."""
    weak, strong = replace(EVENT, noise_multiplier=0.9), replace(EVENT, noise_multiplier=4.0)
    budget = replace(BUDGET, target_epsilon=2.5, accountant="rdp")  # the quickest
    ends = []
    for history in ([weak], [strong], [weak, strong], [strong, strong, weak]):
        events = []
        while len(events) < 20 and not would_exceed(
            [(event,) for event in events], (history[len(events) % len(history)],), budget
        ):
            events.append(history[len(events) % len(history)])
            assert epsilon(events, 1e-5, "rdp") <= 2.5
        following = history[len(events) % len(history)]
        assert (epsilon([*events, following], 1e-5, "rdp") > 2.5) == (len(events) < 20)
        ends.append(len(events))
    assert 0 < ends[0] < ends[2] and ends[1] == 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_epsilon": 0.0},
        {"target_epsilon": float("inf")},
        {"target_delta": 1.0},
        {"max_participations": 0},
    ],
)
def test_a_budget_without_limit_is_no_budget(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(BUDGET, **wrong)


def _forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("mark", [None, "mark"])
def test_two_processes_cannot_both_take_the_last_participation(tmp_path, mark):
    budget = replace(BUDGET, max_participations=12)
    path, mark = tmp_path / "l", mark and tmp_path / mark
    would_exceed([], (EVENT,), budget)  # the children inherit the answer

    def work(run):
        for round in range(12):
            try:
                debit(opened(path, mark=mark), round, run=run, budget=budget)
            except LedgerError:
                os._exit(1)  # the other one's progress was taken for damage
            except PrivacyError:
                return

    children = [_forked(lambda run=run: work(run)) for run in ("a", "b")]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    entries = opened(path).debits
    assert len(entries) == 12 and len({(entry.run, entry.round) for entry in entries}) == 12


def test_a_killed_process_leaves_a_ledger_that_holds_all_it_was_told(tmp_path):
    """The pipe plays the network: what was sent after a debit has that debit on disk."""
    ledger = opened(tmp_path / "l")
    budget = replace(BUDGET, max_participations=5000, target_epsilon=100.0)
    would_exceed([], (EVENT,), budget)
    draw, told = random.Random(2), 0
    for attempt in range(15):
        read, write = os.pipe()

        def work(attempt=attempt, write=write):
            for round in range(5000):
                debit(ledger, round, run=f"run-{attempt}", budget=budget)
                os.write(write, b".")

        child = _forked(work)
        os.close(write)
        if attempt % 2:  # on a busy machine a child that is killed by the clock alone may never have begun
            told += len(os.read(read, 1))
        time.sleep(0.002 + 0.03 * draw.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told += len(os.read(read, 1 << 16))
        os.close(read)
        assert len(opened(ledger.path).debits) >= told
    assert told > 0 and len(opened(ledger.path).debits) <= told + 15
