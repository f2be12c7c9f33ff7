"""A ledger that was cut, edited, lost, put back or is somebody else's is refused, each in words of its own."""

import json
import random
from hashlib import sha256

import pytest

from fedlora.errors import LedgerError
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_mark import require_reached

from .ledgers import debit, opened, seen, spending


@pytest.fixture
def spent(tmp_path):
    return spending(tmp_path / "node" / "ledger.jsonl")


def test_a_crash_at_any_byte_of_a_line_loses_that_line_only(spent):
    whole = spent.path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in {*range(start, len(whole), 7), len(whole) - 2, len(whole) - 1}:
        spent.path.write_bytes(whole[:cut])
        recovered = opened(spent.path)
        # Without its newline alone, the line is whole and counts: never less than was spent.
        assert len(recovered.debits) == (4 if cut == len(whole) - 1 else 3)
        debit(recovered, 7)
        assert opened(spent.path).debits == recovered.debits


def test_a_crash_that_leaves_zeros_at_the_end_loses_that_line_only(spent):
    with spent.path.open("ab") as file:
        file.write(bytes(200))
    assert opened(spent.path).debits == spent.debits


@pytest.mark.fault("F38")
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


def another(lines):
    """The same entries in the chain of another ledger, whose lines do not fit this one's."""
    head = json.dumps({**unsealed(lines[0]), "client": "client-4"})
    return resealed([head, *lines[1:]])


def unsealed(line):
    return {name: value for name, value in json.loads(line).items() if name != "digest"}


def resealed(lines):
    """The lines with every digest and seq true again: the work of who knows the format."""
    sound, head = [], None
    for seq, line in enumerate(lines):
        fields = {**unsealed(line), "seq": seq, **({} if head is None else {"prev": head})}
        digest = sha256(canonical(fields)).hexdigest()
        sound.append(canonical({**fields, "digest": digest}).decode())
        head = sha256(sound[-1].encode()).hexdigest()
    return sound


def canonical(fields):
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lines_without(0), ":1: not a fedlora-ledger header"),
        (lines_without(1), ":2: lines were deleted, entry 2 stands where entry 1 belongs"),
        (lines_without(2, 3), ":3: lines were deleted, entry 4 stands where entry 2 belongs"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], ":2: lines were swapped, entry 2 stands before"),
        (lambda lines: [*lines, lines[-1]], ":7: entry 5 stands here a second time"),
        (lambda lines: [*lines[:2], "", *lines[2:]], ":3: cut short or overwritten"),
        (lambda lines: [*lines[:3], lines[3][:40], *lines[4:]], ":4: cut short or overwritten"),
        (lambda lines: [*lines[:3], lines[3][:40] + lines[4], *lines[5:]], ":4: cut short or overwritten"),
        (lambda lines: [line.replace('"steps":10', '"steps":1') for line in lines], ":2: edited"),
        (lambda lines: [line.replace(",", ", ") for line in lines], ":1: edited"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"round":6', '"round":7')], ":6: edited"),
        (lambda lines: [*lines[:2], *another(lines)[2:]], ":3: entry 2 belongs to another ledger"),
        (lambda lines: resealed([*lines[:3], lines[2], *lines[3:]]), ":4: releases debit 1 a second time"),
        (lambda lines: resealed([*lines, lines[2].replace('"debit":1', '"debit":2')]), ":7: releases debit 2, which"),
        (lambda lines: [], "no header line"),
        (lambda lines: ["not a ledger"], ":1: cut short or overwritten"),
        (lambda lines: ["[1, 2]"], ":1: cut short or overwritten"),
    ],
)  # fmt: skip
@pytest.mark.fault("F38")
def test_each_edit_is_refused_in_words_of_its_own(spent, edit, words):
    lines = edit(spent.path.read_text().splitlines())
    spent.path.write_text("".join(line + "\n" for line in lines))
    before = spent.path.read_bytes()
    for attempt in (lambda: opened(spent.path), lambda: debit(spent, 9), lambda: read_ledger(spent.path)):
        with pytest.raises(LedgerError, match="backup") as refused:
            attempt()
        assert words in str(refused.value)
    assert spent.path.read_bytes() == before


@pytest.mark.parametrize("keep", [2, 3, 4, 5])
@pytest.mark.fault("F38")
def test_whole_lines_gone_from_the_end_are_noticed_by_whoever_saw_them(spent, keep):
    witness, lines = seen(spent), spent.path.read_bytes().splitlines(keepends=True)
    require_reached(spent.path, read_ledger(spent.path), witness)
    spent.path.write_bytes(b"".join(lines[:keep]))
    contents = read_ledger(spent.path)  # nothing in the file itself tells
    with pytest.raises(LedgerError, match=f"rolled back, it has {keep - 1} entries and had 5.*backup"):
        require_reached(spent.path, contents, witness)


def test_a_ledger_begun_anew_or_another_ones_is_noticed_by_whoever_saw_the_old_one(spent, tmp_path):
    witness = seen(spent)
    with pytest.raises(LedgerError, match=r"missing, but it had at least 5 entries.*backup"):
        require_reached(spent.path, None, witness)
    other = opened(tmp_path / "other")
    for round in range(6):
        debit(other, round)
    with pytest.raises(LedgerError, match=r"not the ledger that was seen before, entry 5 differs.*backup"):
        require_reached(other.path, read_ledger(other.path), witness)


@pytest.mark.fault("F38")
def test_a_mark_elsewhere_notices_what_became_of_the_ledger(tmp_path):
    path, mark = tmp_path / "l", tmp_path / "elsewhere" / "mark"
    ledger = opened(path, mark=mark)
    assert not mark.exists()  # nothing was spent, so nothing would be lost
    ledger.release(debit(ledger, 1), "a" * 64)
    yesterday = path.read_bytes()
    debit(ledger, 2)
    today = path.read_bytes()
    assert opened(path, mark=mark).debits == ledger.debits
    for state, words in ((yesterday, "rolled back, it has 2 entries and had 3"), (None, "missing")):
        path.unlink()
        if state is not None:
            path.write_bytes(state)
        for attempt in (lambda: opened(path, mark=mark), lambda: debit(ledger, 3)):
            with pytest.raises(LedgerError, match=words if state else "missing|No such file"):
                attempt()
        assert (path.read_bytes() if path.exists() else None) == state
        path.write_bytes(today)
    mark.write_text("no mark")
    with pytest.raises(LedgerError, match=r"no mark of a ledger.*backup"):
        opened(path, mark=mark)


@pytest.mark.fault("F48")
def test_a_newer_format_another_owner_other_records_or_other_noise_are_refused(spent):
    for wrong, name in (
        ({"client": "client-4"}, "foreign, its client is 'client-3'"),
        ({"fingerprint": "0" * 64}, "foreign, it is of other records"),
        ({"noise": "os-entropy"}, "foreign, its noise is 'seeded'"),
    ):
        with pytest.raises(LedgerError, match=name):
            opened(spent.path, **wrong)
    text = spent.path.read_text()
    spent.path.write_text(text.replace('"version":2', '"version":3', 1))
    with pytest.raises(LedgerError, match=r"version 3, this fedlora reads 2; use the fedlora that wrote it"):
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
