"""`fedlora budget`: what one ledger, a run or a data owner's node has spent, its chain verified."""

import json
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.config.template import NODE_YAML
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import open_ledger
from fedlora.values import DpEvent

EVENT = DpEvent(noise_multiplier=1.5, sample_rate=0.01, steps=10)
BUDGET = Budget(target_epsilon=8.0, target_delta=1e-5, max_participations=10, accountant="pld")


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Three participations of one owner."""
    path = tmp_path / "ledger.jsonl"
    book = open_ledger(path, client="hospital-a", dataset_fingerprint="d", noise_kind="os-entropy")
    for number in (1, 2, 3):
        book.debit("r", number, f"request {number}", (EVENT,), max_grad_norm=1.0, budget=BUDGET)
    return path


@pytest.fixture
def node(tmp_path: Path, ledger: Path) -> Path:
    path = tmp_path / "node.yaml"
    path.write_text(NODE_YAML.replace("/var/lib/fedlora/ledger.jsonl", str(ledger)))
    return path


def told(capsys, *arguments: object) -> str:
    status = main(["budget", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_a_lone_ledger_tells_participations_epsilon_its_delta_and_that_the_chain_holds(ledger, capsys):
    text = told(capsys, ledger)
    assert "3 of -" in text and "1e-05" in text and "chain verified: 3 participations" in text
    (row,) = json.loads(told(capsys, ledger, "--format", "json"))
    assert (row["client"], row["participations"], row["verified"]) == ("hospital-a", 3, True)
    assert (row["epsilon"], row["delta"]) == (epsilon([EVENT] * 3, 1e-5), 1e-5)
    (row,) = json.loads(told(capsys, ledger, "--delta", "1e-7", "--format", "json"))
    assert (row["epsilon"], row["delta"]) == (epsilon([EVENT] * 3, 1e-7), 1e-7)


def test_what_is_no_ledger_is_not_taken_for_a_lost_one(tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("Milk, bread.\n")
    for words in (["budget", str(path)], ["budget", "verify", str(path)]):
        assert main(words) == 3
        told = capsys.readouterr().err
        assert "no ledger begins so; name a run directory" in told and "if this is one: what this" in told
        assert "Milk" not in told


def test_a_node_tells_what_is_left_of_its_own_budget(node, ledger, capsys):
    (row,) = json.loads(told(capsys, node, "--format", "json"))
    assert (row["participations"], row["max_participations"], row["verified"]) == (3, 20, True)
    assert row["left"] == pytest.approx(8.0 - epsilon([EVENT] * 3, 1e-5))
    assert "chain verified: 3 participations" in told(capsys, node)
    ledger.unlink()
    text = told(capsys, node)
    assert "0 of 20" in text and "no ledger yet" in text and "verified" not in text


def test_seeded_noise_is_a_simulation_and_noise_of_the_system_is_not(ledger, node, tmp_path, capsys):
    seeded = tmp_path / "seeded.jsonl"
    open_ledger(seeded, client="c", dataset_fingerprint="d", noise_kind="seeded")
    assert "SIMULATION: not a guarantee" in told(capsys, seeded)
    for path in (ledger, node):
        assert "SIMULATION" not in told(capsys, path)


def test_an_edited_ledger_is_refused_with_status_3(ledger, node, capsys):
    ledger.write_text(ledger.read_text().replace('"steps":10', '"steps":11', 1))
    for path in (ledger, node):
        assert main(["budget", str(path)]) == 3
        assert f"{ledger}:2" in capsys.readouterr().err


def test_a_delta_beside_a_budget_that_has_one_is_an_error(node, capsys):
    assert main(["budget", str(node), "--delta", "1e-6"]) == 2
    assert "has its own target_delta" in capsys.readouterr().err
