"""`fedlora check node.yaml`: what an owner has to know before the node starts, and which line to mend."""

import json
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.code_digest import code_digest
from fedlora.config.kinds import is_node
from fedlora.config.load import load_node
from fedlora.config.template import NODE_YAML, RUN_YAML
from fedlora.deploy.node import DeployedNode
from fedlora.methods import build
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import open_ledger
from fedlora.privacy.noise import OS_ENTROPY
from fedlora.runs.beginning import first_state, origin
from fedlora.training.checkpoints import weights_digest
from fedlora.training.load import load_model
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate, DpEvent, LocalWork, TrainRequest


def checked(capsys, path: Path, *changes: str) -> dict:
    words = [word for change in changes for word in ("--set", change)]
    assert main(["check", str(path), *words, "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_node_is_told_from_a_run_by_its_keys(tmp_path):
    for name, text, wanted in (("a", NODE_YAML, True), ("b", RUN_YAML, False), ("c", "seed: 1\n", False)):
        (tmp_path / name).write_text(text)
        assert is_node(tmp_path / name) is wanted


def test_records_noise_epsilon_and_digests_are_told_and_nothing_is_written(
    node, capsys, tmp_path, tiny_encoder
):
    before = sorted(tmp_path.rglob("*"))
    found = checked(capsys, node)
    assert (found["client"], found["declared_records"], found["records"]) == ("site-0", 400, 360)
    once = DpEvent(
        noise_multiplier=found["noise_multiplier"],
        sample_rate=16 / 400,
        steps=2,
        expected_batch=16.0,
        max_draw=found["max_draw"],
    )
    assert found["sample_rate"] == once.sample_rate and found["noise_multiplier"] >= 0.3
    assert found["epsilon_once"] == epsilon([once], 1e-5) < found["epsilon_all"]
    assert found["epsilon_all"] == epsilon([once] * 2, 1e-5) <= 8.0
    assert found["code"] == code_digest() and found["base_model"] == weights_digest(str(tiny_encoder))
    assert (found["spent"]["epsilon"], found["spent"]["left"]) == (0.0, 8.0)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_printed_digests_are_accepted_as_they_stand(node, capsys):
    assert main(["check", str(node)]) == 0
    text = capsys.readouterr().out
    accept = text[text.index("accept:") : text.index("\n\n", text.index("accept:"))]
    node.write_text(f"{node.read_text()}{accept}\n")
    assert load_node(node).accept.code == [code_digest()]
    assert not any("accept" in note for note in checked(capsys, node)["notes"])
    node.write_text(node.read_text().replace(code_digest(), "0" * 64))
    assert "accept.code does not list this fedlora" in " ".join(checked(capsys, node)["notes"])


def test_what_is_spent_and_left_comes_from_the_ledger(node, capsys):
    event = DpEvent(noise_multiplier=1.0, sample_rate=0.04, steps=2)
    config = load_node(node)
    book = open_ledger(Path(config.ledger), client="site-0", dataset_fingerprint="d", noise_kind="os-entropy")
    book.debit("r", 1, "request", (event,), max_grad_norm=1.0, budget=Budget.of(config.budget))
    spent = checked(capsys, node)["spent"]
    assert (spent["participations"], spent["epsilon"]) == (1, epsilon([event], 1e-5))
    assert spent["left"] == 8.0 - spent["epsilon"]
    Path(config.ledger).write_text("{}\n")
    assert main(["check", str(node)]) == 3 and f"{config.ledger}:1" in capsys.readouterr().err


def test_what_a_node_leaves_behind_is_proved(node, capsys, tiny_config):
    """Debit, reply and release as the node itself writes them, checked by who only reads them."""
    config = load_node(node, ["reply_quantum_s=0", "evaluation_noise=30"])
    run = tiny_config()
    model = load_model(config.model, config.task, config.lora, tuple(config.classes), 0)
    state = first_state(run, model, build(run.method, run.lora, run.seed))
    own = origin(run, "r")
    request = TrainRequest(
        run="r",
        base_model=own.base_model,
        code=own.code,
        round=1,
        adapters=state.adapters,
        work=LocalWork(steps=2, learning_rate=1.0),
    )
    answer = DeployedNode(config).answer(encode_request(request))
    assert isinstance(decode_reply(answer), ClientUpdate)
    assert main(["budget", "verify", str(node), "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["debits"], row["releases"], row["replies"]) == (
        1,
        1,
        {"kept": 1, "acknowledged": 0, "unsent": 0},
    )
    assert [mechanism["kind"] for mechanism in row["mechanisms"]] == ["training", "evaluation"]
    assert row["noise_source"] == OS_ENTROPY and row["accountants_agree"]


def test_records_that_are_not_here_are_not_counted(node, capsys):
    found = checked(capsys, node, "data.train=/nowhere/train.tsv")
    assert found["records"] is None and "not counted" in " ".join(found["notes"])


@pytest.mark.parametrize(
    ("old", "new", "line", "status", "says"),
    [
        ("1.0e-5", "0.5", 10, 3, "budget.target_delta 0.5 is not below 1 / 400"),
        ("records: 400", "records: 100", 3, 3, "declared_records: 100, but there are 360"),
        ("text: sentence", "text: words", 2, 2, "data: "),
        ("name: /", "name: /nowhere/", 5, 2, "model.name "),
        (
            "max_participations: 2",
            "max_participations: 0",
            10,
            2,
            "budget.max_participations: 0 does not fit",
        ),
        ("max_grad_norm: 1.0", "max_grad: 1.0", 11, 2, "max_grad: unknown key; write max_grad_norm"),
    ],
)
def test_a_mistake_is_told_with_file_line_and_key(node, capsys, old, new, line, status, says):
    node.write_text(node.read_text().replace(old, new))
    assert main(["check", str(node)]) == status
    err = capsys.readouterr().err
    assert any(told.startswith(f"{node}:{line}: {says}") for told in err.splitlines()), err
    assert "privacy." not in err and "federation." not in err
