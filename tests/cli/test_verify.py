"""`fedlora budget verify`: an auditor who trusts nothing but the file gets the proof, or status 3 and the reason."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.config.template import NODE_YAML
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger, open_ledger, read_ledger
from fedlora.privacy.outbox import Kept, Outbox
from fedlora.runtime.simulate import simulate
from fedlora.values import DpEvent

STEPS = DpEvent(noise_multiplier=1.5, sample_rate=0.01, steps=10, expected_batch=50.0, max_draw=189)
TOLD = DpEvent(noise_multiplier=50.0, sample_rate=1.0, steps=1)
BUDGET = Budget(target_epsilon=8.0, target_delta=1e-5, max_participations=10, accountant="pld")


def take_part(book: Ledger, number: int, outbox: Outbox | None = None) -> None:
    """One participation as a node makes it: paid, and if there is an outbox, answered."""
    request = f"request {number}"
    debit = book.debit("r", number, request, (STEPS, TOLD), max_grad_norm=2.0, budget=BUDGET)
    if outbox is None:
        return
    outbox.directory.mkdir(exist_ok=True)
    kept = Kept(run="r", round=number, request_digest=request, paid=book.witness(debit), frame=b"x" * number)
    outbox.keep(kept)
    book.release(debit, hashlib.sha256(kept.frame).hexdigest())


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Two rounds answered; before the second, an attempt that left no reply."""
    path = tmp_path / "ledger.jsonl"
    book = open_ledger(path, client="hospital-a", dataset_fingerprint="d" * 64, noise_kind="os-entropy")
    outbox = Outbox(tmp_path / "ledger.jsonl.outbox")
    take_part(book, 1, outbox)
    take_part(book, 2)
    take_part(book, 2, outbox)
    return path


@pytest.fixture
def node(tmp_path: Path, ledger: Path) -> Path:
    path = tmp_path / "node.yaml"
    path.write_text(NODE_YAML.replace("/var/lib/fedlora/ledger.jsonl", str(ledger)))
    return path


def proof(capsys, *arguments: object) -> list[dict]:
    assert main(["budget", "verify", *map(str, arguments), "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: object, status: int = 3) -> str:
    assert main(["budget", "verify", *map(str, arguments)]) == status
    return capsys.readouterr().err


def test_epsilon_is_computed_from_the_ledger_alone_and_from_events(ledger, capsys, tmp_path):
    """I-4, I-5: no epsilon is written anywhere in the file, and a copy far from its node says the same."""
    assert b"epsilon" not in ledger.read_bytes()
    alone = tmp_path / "elsewhere" / "copy"
    alone.parent.mkdir()
    shutil.copy(ledger, alone)
    (row,) = proof(capsys, alone)
    assert row["epsilon"] == epsilon([STEPS, TOLD] * 3, 1e-5) == row["epsilon_pld"]
    assert row["epsilon_prv"] == epsilon([STEPS, TOLD] * 3, 1e-5, "prv")
    assert row["epsilon_rdp"] == epsilon([STEPS, TOLD] * 3, 1e-5, "rdp") > row["epsilon"]
    assert row["accountants_agree"] is True and row["objection"] is None
    (other,) = proof(capsys, alone, "--delta", "1e-7")
    assert other["epsilon"] == epsilon([STEPS, TOLD] * 3, 1e-7) > row["epsilon"]


def test_the_proof_names_unit_adjacency_noise_and_replace_one(ledger, capsys):
    """I-7."""
    (row,) = proof(capsys, ledger)
    terms = {key: row[key] for key in ("client", "unit", "adjacency", "noise_source")}
    assert (
        row["dataset"] == read_ledger(ledger).header.dataset_fingerprint != "d" * 64
    )  # under the ledger's key
    assert terms == {
        "client": "hospital-a",
        "unit": "record",
        "adjacency": "zero-out",
        "noise_source": "os-entropy",
    }
    assert (
        row["epsilon_replace_one"] == epsilon([STEPS, TOLD] * 3, 1e-5, "pld", "replace-one") > row["epsilon"]
    )
    assert main(["budget", "verify", str(ledger)]) == 0
    text = capsys.readouterr().out
    for said in (
        "one record of one client",
        "zero-out",
        "operating system",
        "replace-one",
        "pld and prv agree",
    ):
        assert said in text, said


def test_every_debit_release_and_lost_attempt_is_counted(ledger, capsys):
    (row,) = proof(capsys, ledger)
    counts = {key: row[key] for key in ("entries", "debits", "releases", "rounds", "lost_attempts")}
    assert counts == {"entries": 5, "debits": 3, "releases": 2, "rounds": 2, "lost_attempts": 1}
    training, evaluation = row["mechanisms"]
    assert (training["kind"], training["steps"], training["max_grad_norm"]) == ("training", 30, 2.0)
    assert (evaluation["kind"], evaluation["steps"], evaluation["noise_multiplier"]) == (
        "evaluation",
        3,
        50.0,
    )


def test_a_node_proves_its_replies_too(node, capsys):
    (row,) = proof(capsys, node)
    assert row["replies"] == {"kept": 2, "acknowledged": 0, "unsent": 0}
    assert main(["budget", "verify", str(node)]) == 0
    assert "2 kept, their bytes are those recorded" in capsys.readouterr().out


def test_a_reply_that_was_kept_and_not_yet_recorded_is_unsent(node, ledger, capsys):
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]))
    (row,) = proof(capsys, node)
    assert row["replies"] == {"kept": 2, "acknowledged": 0, "unsent": 1}


def test_changed_bytes_of_a_reply_are_refused(node, ledger, capsys):
    first, _ = sorted(Path(f"{ledger}.outbox").glob("*.reply"))
    first.write_bytes(first.read_bytes() + b"!")
    assert "it was changed since" in refusal(capsys, node)
    assert main(["budget", "verify", str(ledger)]) == 0  # the ledger alone still holds


def acknowledge_the_first(ledger: Path) -> None:
    """As a request of the next round does, whose server has heard of round 1."""
    outbox = Outbox(Path(f"{ledger}.outbox"))
    first = outbox.find("r", 1)
    assert first is not None
    outbox.forget_acknowledged("r", 2, first.paid)


def test_a_node_whose_server_has_its_replies_proves_the_others(node, ledger, capsys):
    acknowledge_the_first(ledger)
    (row,) = proof(capsys, node)
    assert row["replies"] == {"kept": 1, "acknowledged": 1, "unsent": 0}
    assert main(["budget", "verify", str(node)]) == 0
    assert "1 kept, their bytes are those recorded; the server has 1 more" in capsys.readouterr().out


def test_a_reply_that_is_gone_and_was_never_sent_is_refused(node, ledger, capsys):
    second = Outbox(Path(f"{ledger}.outbox")).find("r", 2)
    assert second is not None
    Outbox(Path(f"{ledger}.outbox")).keep(replace(second, frame=b""))
    assert main(["budget", "verify", str(node)]) == 0  # it was sent, and the server may have said so
    capsys.readouterr()
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]))
    assert "is empty, but debit" in refusal(capsys, node)


def test_a_reply_that_no_debit_paid_for_is_refused(node, ledger, capsys):
    first, _ = sorted(Path(f"{ledger}.outbox").glob("*.reply"))
    shutil.copy(first, first.with_name(f"{'0' * 32}-000009.reply"))
    assert "1 have no debit" in refusal(capsys, node)


def test_a_ledger_behind_its_replies_is_refused(node, ledger, capsys):
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:3]))
    assert "rolled back" in refusal(capsys, node)
    ledger.unlink()
    assert "missing, but it had at least" in refusal(capsys, node)


def test_a_ledger_behind_its_mark_is_refused_though_its_replies_are_gone_too(node, ledger, capsys, tmp_path):
    mark = tmp_path / "elsewhere" / "mark.json"
    book = open_ledger(
        ledger, client="hospital-a", dataset_fingerprint="d" * 64, noise_kind="os-entropy", mark=mark
    )
    take_part(book, 3)
    node.write_text(f"{node.read_text()}mark: {mark}\n")
    proof(capsys, node)
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:2]))
    shutil.rmtree(f"{ledger}.outbox")
    assert "rolled back" in refusal(capsys, node)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda lines: [*lines[:1], lines[1].replace(b'"steps":10', b'"steps":11'), *lines[2:]], ":2:"),
        (lambda lines: [*lines[:2], *lines[3:]], ":3:"),
        (lambda lines: [lines[0], lines[3], *lines[1:3], *lines[4:]], ":2:"),
        (lambda lines: lines[1:], ":1:"),
        (lambda lines: [b"{}\n", *lines[1:]], ":1:"),
    ],
)
def test_a_ledger_that_does_not_hold_is_status_3_with_its_own_message(ledger, node, capsys, break_it, says):
    ledger.write_bytes(b"".join(break_it(ledger.read_bytes().splitlines(keepends=True))))
    for path in (ledger, node):
        told = refusal(capsys, path)
        assert told.startswith(f"{ledger}{says}") and "nothing may be released" in told


def test_another_clients_ledger_is_refused(node, capsys):
    node.write_text(node.read_text().replace("client: hospital-a", "client: hospital-b"))
    assert "foreign" in refusal(capsys, node)
    assert main(["budget", str(node)]) == 3 and "foreign" in capsys.readouterr().err


def test_where_accountants_do_not_agree_the_proof_is_shown_and_the_status_is_3(tmp_path, capsys):
    path = tmp_path / "loud.jsonl"
    book = open_ledger(path, client="c", dataset_fingerprint="d", noise_kind="os-entropy")
    loud = replace(TOLD, noise_multiplier=0.03)
    wide = replace(BUDGET, target_epsilon=1e6)
    book.debit("r", 1, "request", (loud,), max_grad_norm=1.0, budget=wide)
    assert main(["budget", "verify", str(path), "--format", "json"]) == 3
    out, err = capsys.readouterr()
    (row,) = json.loads(out)
    assert row["accountants_agree"] is False and row["epsilon"] > 300
    assert str(path) in row["objection"] and row["objection"] in err


def test_budget_alone_still_shows_and_verify_is_a_command_of_its_own(ledger, node, capsys):
    for path in (ledger, node):
        assert main(["budget", str(path)]) == main(["budget", "show", str(path)]) == 0
        alone, shown = capsys.readouterr().out.split("client", 1)[1].split("client", 1)
        assert alone.split() == shown.split() and "3 of" in alone
    assert main(["budget", "verify", str(node), "--delta", "1e-6"]) == 2
    assert "has its own target_delta" in capsys.readouterr().err
    assert main(["budget", "verify", "nowhere"]) == 2 and "no such file" in capsys.readouterr().err
    assert main(["budget"]) == 2 and "PATH" in capsys.readouterr().err


def test_a_node_that_has_spent_nothing_has_nothing_to_prove(node, ledger, capsys):
    ledger.unlink()
    shutil.rmtree(f"{ledger}.outbox")
    assert "nothing was spent, or all was lost" in refusal(capsys, node, status=2)


def test_a_run_proves_all_its_ledgers_its_rounds_and_its_summary(tiny_config, tmp_path, capsys):
    run = tmp_path / "run"
    simulate(tiny_config(federation__rounds=1), run, lambda event: None)
    summary = json.loads((run / "summary.json").read_text())
    rows = proof(capsys, run)
    assert {row["client"]: row["epsilon"] for row in rows} == {
        client: found for client, found in summary["epsilon_by_client"].items() if found
    }
    assert main(["budget", "verify", str(run)]) == 0
    assert f"chains hold: {len(rows)} entries in {len(rows)} ledgers" in capsys.readouterr().out
    asked = rows[0]["client"]
    better = {**summary["epsilon_by_client"], asked: 0.1}
    (run / "summary.json").write_text(json.dumps({**summary, "epsilon_by_client": better}))
    assert f"says epsilon 0.1 of {asked}" in refusal(capsys, run)
    (run / "ledgers" / f"{asked}.jsonl").unlink()
    assert f"{asked} answered 1 rounds" in refusal(capsys, run)
