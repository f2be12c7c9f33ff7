"""What was spent stays spent: through crashes, edits, other owners and parallel processes."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.errors import LedgerError, PrivacyError
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget, would_exceed
from fedlora.privacy.calibration import noise_multiplier
from fedlora.privacy.ledger import open_ledger, read_ledger
from fedlora.values import DpEvent

EVENT = DpEvent(noise_multiplier=1.1, sample_rate=0.02, steps=10)
BUDGET = Budget(target_epsilon=8.0, target_delta=1e-5, max_participations=50, accountant="pld")


def opened(path, client="client-3", fingerprint="f" * 64, noise="seeded"):
    return open_ledger(path, client=client, dataset_fingerprint=fingerprint, noise_kind=noise)


def debit(ledger, round, event=EVENT, run="r", digest="d", bound=1.0, budget=BUDGET):
    return ledger.debit(run, round, digest, event, max_grad_norm=bound, budget=budget)


@pytest.fixture
def spent(tmp_path):
    """A ledger of four debits of two mechanisms."""
    ledger = opened(tmp_path / "node" / "ledger.jsonl")
    for round in (1, 2, 5):
        debit(ledger, round)
    debit(ledger, 6, replace(EVENT, noise_multiplier=0.1 + 0.7, steps=1))
    return ledger


def test_a_new_process_reads_the_same_spending(spent):
    again = opened(spent.path)
    assert again.entries == spent.entries == read_ledger(spent.path).entries
    assert [entry.seq for entry in again.entries] == [1, 2, 3, 4]
    assert again.events[3].noise_multiplier == 0.1 + 0.7  # exactly: floats are written as their repr
    assert (
        again.find("r", 5) == spent.entries[2] and again.find("r", 3) is None and again.find("q", 5) is None
    )
    assert epsilon(again.events, 1e-5) == epsilon(spent.events, 1e-5) > 0
    assert oct(spent.path.stat().st_mode & 0o777) == "0o600"


def test_lines_are_what_the_format_says(spent):
    lines = spent.path.read_text().splitlines()
    header, first = json.loads(lines[0]), json.loads(lines[1])
    assert {
        "format": "fedlora-ledger",
        "version": 1,
        "client": "client-3",
        "dataset": "f" * 64,
        "noise": "seeded",
        "seq": 0,
    }.items() <= header.items()
    assert first["event"] == {"noise_multiplier": 1.1, "sample_rate": 0.02, "max_grad_norm": 1.0, "steps": 10}
    assert "epsilon" not in spent.path.read_text()


def test_a_crash_at_any_byte_of_a_line_loses_that_line_only(spent):
    whole = spent.path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in {*range(start, len(whole), 7), len(whole) - 2, len(whole) - 1}:
        spent.path.write_bytes(whole[:cut])
        recovered = opened(spent.path)
        # Without its newline alone, the line is whole and counts: never less than was spent.
        assert len(recovered.entries) == (4 if cut == len(whole) - 1 else 3)
        debit(recovered, 7)
        assert opened(spent.path).entries == recovered.entries


def test_a_crash_that_leaves_zeros_at_the_end_loses_that_line_only(spent):
    with spent.path.open("ab") as file:
        file.write(bytes(200))
    assert opened(spent.path).entries == spent.entries


def test_any_other_damage_is_refused(spent):
    whole = spent.path.read_bytes()
    draw = random.Random(1)
    start = whole[:-1].rindex(b"\n")
    positions = [*draw.sample(range(len(whole) - 1), 150), start, start + 1, len(whole) - 2]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(7)
        spent.path.write_bytes(damaged)
        with pytest.raises(LedgerError, match=r"ledger.jsonl:\d"):
            opened(spent.path)
        with pytest.raises(LedgerError):
            read_ledger(spent.path)
        assert spent.path.read_bytes() == bytes(damaged)  # evidence is not touched


def lines_without(*gone):
    return lambda lines: [line for number, line in enumerate(lines) if number not in gone]


@pytest.mark.parametrize(
    "edit",
    [
        lines_without(0),
        lines_without(1),
        lines_without(2, 3),
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:2], "", *lines[2:]],
        lambda lines: [line.replace('"steps":10', '"steps":1') for line in lines],
        lambda lines: [line.replace(",", ", ") for line in lines],
        lambda lines: [],
        lambda lines: ["not a ledger"],
        lambda lines: ["[1, 2]"],
    ],
)
def test_edits_are_refused(spent, edit):
    lines = edit(spent.path.read_text().splitlines())
    spent.path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(LedgerError, match="backup"):
        opened(spent.path)
    with pytest.raises(LedgerError):
        debit(spent, 9)


def test_an_edited_last_line_is_refused_though_nothing_follows_it(spent):
    lines = spent.path.read_text().splitlines()
    lines[-1] = lines[-1].replace('"round":6', '"round":7')
    spent.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match=":5: edited"):
        opened(spent.path)


def test_a_newer_format_another_owner_other_records_or_other_noise_are_refused(spent):
    for wrong, name in (
        ({"client": "client-4"}, "client"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"noise": "os-entropy"}, "noise"),
    ):
        with pytest.raises(LedgerError, match=name):
            opened(spent.path, **wrong)
    text = spent.path.read_text()
    spent.path.write_text(text.replace('"version":1', '"version":2', 1))
    with pytest.raises(LedgerError, match=r"version 2.*install"):
        opened(spent.path)


def test_a_ledger_that_cannot_be_written_releases_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="nothing may be released"):
        opened(tmp_path / "file" / "ledger.jsonl")
    with pytest.raises(LedgerError, match="nothing may be released"):
        opened(tmp_path)
    with pytest.raises(LedgerError):
        read_ledger(tmp_path / "missing.jsonl")
    ledger = opened(tmp_path / "gone.jsonl")
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="nothing may be released"):
        debit(ledger, 1)


def test_the_same_request_is_paid_once_and_another_one_is_refused(spent):
    before = spent.path.read_bytes()
    assert debit(spent, 5) == spent.entries[2]
    for changed in ({"digest": "e"}, {"bound": 2.0}, {"event": replace(EVENT, steps=11)}):
        with pytest.raises(LedgerError, match="one round is answered once"):
            debit(spent, 5, **changed)
    assert spent.path.read_bytes() == before
    debit(spent, 5, run="another")  # another run is another release
    assert len(opened(spent.path).entries) == 5


def test_noise_that_cannot_be_repeated_is_never_drawn_twice_for_one_debit(tmp_path):
    ledger = opened(tmp_path / "l", noise="os-entropy")
    debit(ledger, 1)
    with pytest.raises(LedgerError, match="stored reply"):
        debit(ledger, 1)
    assert ledger.find("r", 1) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"event": replace(EVENT, steps=0)},
        {"event": replace(EVENT, noise_multiplier=1)},
        {"bound": 0.0},
        {"round": 9.0},
        {"event": replace(EVENT, noise_multiplier=float("inf"))},
        {"run": None},
    ],
)
def test_what_would_not_read_back_is_not_written(spent, wrong):
    before = spent.path.read_bytes()
    with pytest.raises(PrivacyError):
        debit(spent, **{"round": 9, **wrong})
    assert spent.path.read_bytes() == before


def test_it_is_synced_to_disk_before_it_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def recording(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    ledger = opened(tmp_path / "node" / "l")
    assert str(tmp_path / "node") in synced and len(synced) == 2
    debit(ledger, 1)
    assert synced[2:] == [str(tmp_path / "node" / "l")]


def test_participations_end_at_their_maximum(tmp_path):
    budget = replace(BUDGET, max_participations=3)
    ledger = opened(tmp_path / "l")
    for round in range(3):
        assert not would_exceed(ledger.events, EVENT, budget)
        debit(ledger, round, budget=budget)
    assert would_exceed(ledger.events, EVENT, budget)
    for _ in range(2):
        with pytest.raises(PrivacyError, match="3 participations are spent"):
            debit(opened(ledger.path), 3, budget=budget)
    assert debit(ledger, 2, budget=budget).seq == 3  # what was paid may be asked again
    assert len(opened(ledger.path).entries) == 3


@pytest.mark.parametrize("participations", [3])
def test_calibrated_noise_lasts_exactly_as_long_as_agreed(participations):
    sigma = noise_multiplier(3.0, 1e-5, 0.02, 10 * participations)
    event = replace(EVENT, noise_multiplier=sigma)
    budget = Budget(
        target_epsilon=3.0, target_delta=1e-5, max_participations=participations, accountant="pld"
    )
    answers = [would_exceed([event] * done, event, budget) for done in range(participations + 1)]
    assert answers == [False] * participations + [True]


def test_epsilon_ends_it_before_the_count_does():
    """Right for ledgers of one mechanism with too little noise for all participations, and for mixed ones."""
    weak, strong = replace(EVENT, noise_multiplier=0.9), replace(EVENT, noise_multiplier=4.0)
    budget = replace(BUDGET, target_epsilon=2.5, accountant="rdp")  # the quickest
    ends = []
    for history in ([weak], [strong], [weak, strong], [strong, strong, weak]):
        events = []
        while len(events) < 20 and not would_exceed(events, history[len(events) % len(history)], budget):
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


def test_two_processes_cannot_both_take_the_last_participation(tmp_path):
    budget = replace(BUDGET, max_participations=12)
    ledger = opened(tmp_path / "l")
    would_exceed([], EVENT, budget)  # the children inherit the answer

    def work(run):
        for round in range(12):
            try:
                debit(ledger, round, run=run, budget=budget)
            except PrivacyError:
                return

    children = [_forked(lambda run=run: work(run)) for run in ("a", "b")]
    for child in children:
        os.waitpid(child, 0)
    entries = opened(ledger.path).entries
    assert len(entries) == 12 and len({(entry.run, entry.round) for entry in entries}) == 12


def test_a_killed_process_leaves_a_ledger_that_holds_all_it_was_told(tmp_path):
    """The pipe plays the network: what was sent after a debit has that debit on disk."""
    ledger = opened(tmp_path / "l")
    budget = replace(BUDGET, max_participations=5000, target_epsilon=100.0)
    would_exceed([], EVENT, budget)
    draw, told = random.Random(2), 0
    for attempt in range(15):
        read, write = os.pipe()

        def work(attempt=attempt, write=write):
            for round in range(5000):
                debit(ledger, round, run=f"run-{attempt}", budget=budget)
                os.write(write, b".")

        child = _forked(work)
        os.close(write)
        time.sleep(0.002 + 0.03 * draw.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told += len(os.read(read, 1 << 16))
        os.close(read)
        assert len(opened(ledger.path).entries) >= told
    assert told > 0 and len(opened(ledger.path).entries) <= told + 15
