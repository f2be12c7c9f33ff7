"""Each promise of a node, checked; then broken on purpose, and the same check finds it out."""

import hashlib
import json
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config.node import Accepted, NodeConfig
from fedlora.deploy.node import DeployedNode
from fedlora.errors import WireError
from fedlora.privacy.ledger import Ledger, read_ledger
from fedlora.training import client as client_module
from fedlora.training import tasks
from fedlora.transport import flower_client
from fedlora.transport.flower_client import frame_content
from fedlora.transport.wire import MAGIC, decode_reply, encode_reply, encode_request
from fedlora.values import ClientUpdate, LocalWork, RefusalReason, TrainRequest, Witness
from tests.damage import flipped
from tests.deploy import test_journal as journals
from tests.deploy.nodes import debits, reason, without_records

SECRET = "canary4711"


@dataclass(frozen=True)
class Case:
    """A node that was never asked, and what a check may use."""

    config: NodeConfig
    request: TrainRequest
    folder: Path
    caplog: pytest.LogCaptureFixture
    monkeypatch: pytest.MonkeyPatch

    def answer(self, echo: Witness | None = None, **changes: Any) -> bytes:
        return DeployedNode(self.config).answer(encode_request(replace(self.request, **changes)), echo)

    def unread(self, **changes: Any) -> RefusalReason:
        """The refusal of a node that may not look at a record."""
        return reason(without_records(self.config).answer(encode_request(replace(self.request, **changes))))

    def outbox(self) -> list[Path]:
        return sorted(Path(f"{self.config.ledger}.outbox").glob("*.reply"))

    def lines(self) -> list[bytes]:
        return Path(self.config.ledger).read_bytes().splitlines(keepends=True)

    def write(self, lines: list[bytes]) -> None:
        Path(self.config.ledger).write_bytes(b"".join(lines))


def the_owners_policy_comes_first(case: Case) -> None:
    assert case.unread(work=LocalWork(steps=3, learning_rate=1.0)) == RefusalReason.BAD_REQUEST
    assert case.unread(base_model="0" * 64) == RefusalReason.BAD_REQUEST
    pinned = case.config.model_copy(update={"accept": Accepted(code=["0" * 64])})
    assert reason(without_records(pinned).answer(encode_request(case.request))) == RefusalReason.BAD_REQUEST


def a_spent_budget_comes_first(case: Case) -> None:
    for number in (1, 2):
        case.answer(round=number)
    assert case.unread(round=3) == RefusalReason.BUDGET
    assert debits(case.config) == 2


def one_round_has_one_reply(case: Case) -> None:
    first = case.answer()
    assert case.answer() == first and debits(case.config) == 1


def an_altered_reply_stays_here(case: Case) -> None:
    first = case.answer()
    (path,) = case.outbox()
    path.write_bytes(flipped(path.read_bytes()))
    said = case.answer()
    assert len(said) != len(first) and reason(said) == RefusalReason.LEDGER


def a_round_has_one_request(case: Case) -> None:
    case.answer()
    assert case.unread(work=LocalWork(steps=1, learning_rate=1.0)) == RefusalReason.BAD_REQUEST


def each_attempt_is_paid(case: Case) -> None:
    case.answer()
    for path in case.outbox():
        path.unlink()
    case.answer()
    assert debits(case.config) == 2


def attempts_come_to_an_end(case: Case) -> None:
    budget = case.config.budget.model_copy(update={"max_participations": 9})
    patient = replace(case, config=case.config.model_copy(update={"budget": budget}))
    for _ in range(5):
        patient.answer()
        for path in patient.outbox():
            path.unlink()
    assert debits(patient.config) == 3


def an_edited_ledger_is_refused(case: Case) -> None:
    case.answer()
    header, debit, _ = case.lines()
    for path in case.outbox():
        path.unlink()
    case.write([header, debit.replace(b'"steps":2', b'"steps":1')])  # no line follows that would tell
    assert reason(case.answer(round=2)) == RefusalReason.LEDGER


def a_ledger_without_one_of_its_lines_is_refused(case: Case) -> None:
    for number in (1, 2):
        case.answer(round=number)
    lines = case.lines()
    for path in case.outbox():
        path.unlink()
    case.write([*lines[:2], *lines[3:]])
    assert reason(case.answer(round=3)) == RefusalReason.LEDGER


def a_ledger_put_back_is_refused(case: Case) -> None:
    case.answer()
    yesterday = case.lines()
    case.answer(round=2)
    case.write(yesterday)
    assert reason(case.answer(round=3)) == RefusalReason.LEDGER


def a_foreign_ledger_is_refused(case: Case) -> None:
    case.answer()
    other = replace(case, config=case.config.model_copy(update={"client": "site-1"}))
    assert reason(other.answer(round=2)) == RefusalReason.LEDGER


def the_servers_echo_is_believed(case: Case) -> None:
    ahead = frame_content(encode_request(case.request), Witness(seq=9, head="a" * 64))
    assert reason(case.answer(flower_client.echo_of(ahead))) == RefusalReason.LEDGER


def the_server_is_a_witness(case: Case) -> None:
    claims = journals.Claims(journals.SOUND)
    cohort = journals.Reported(claims, journals.Journal(case.folder / "spent.jsonl"), journals.SOUNDNESS)
    assert journals.answered(cohort, claims, 1, seq=3) is None
    assert journals.answered(cohort, claims, 2, seq=1) == RefusalReason.LEDGER
    assert journals.answered(cohort, claims, 1, seq=3, value=0.5) == RefusalReason.LEDGER


def accuracy_is_paid_for(case: Case) -> None:
    telling = replace(case, config=case.config.model_copy(update={"evaluation_noise": 40.0}))
    told = decode_reply(telling.answer())
    (debit,) = read_ledger(Path(case.config.ledger)).debits
    assert isinstance(told, ClientUpdate) and told.accuracy is not None
    assert len(debit.events) == 2 and debit.events == told.spent


def accuracy_is_noised(case: Case) -> None:
    telling = replace(case, config=case.config.model_copy(update={"evaluation_noise": 40.0}))
    told = [decode_reply(telling.answer(round=number)) for number in (1, 2)]
    assert len({reply.accuracy for reply in told if isinstance(reply, ClientUpdate)}) == 2


def an_update_has_one_length(case: Case) -> None:
    assert len(case.answer()) == len(case.answer(round=1 << 50))


def an_update_holds_nothing_else(case: Case) -> None:
    update = decode_reply(case.answer())
    assert isinstance(update, ClientUpdate)
    delta = replace(update.delta, head={**update.delta.head, "x": torch.zeros(1)})
    frame = encode_reply(replace(update, delta=delta)).replace(b'"head:x"', b'"momen1"')
    start = len(MAGIC) + 4
    (length,) = struct.unpack("<I", frame[len(MAGIC) : start])
    assert "momen1" in [name for name, *_ in json.loads(frame[start : start + length])["tensors"]]
    body = frame[:-32]
    with pytest.raises(WireError):
        decode_reply(body + hashlib.sha256(body).digest())


def an_exceptions_words_stay_inside(case: Case) -> None:
    def breaks(*anything: object) -> None:
        raise RuntimeError(SECRET)

    case.caplog.set_level(logging.DEBUG)
    case.monkeypatch.setattr(client_module, "_local_steps", breaks)
    assert reason(case.answer()) == RefusalReason.FAILED
    assert SECRET not in case.caplog.text


def each_record_runs_alone(case: Case) -> None:
    """The sizes of the micro-batches that the real node's steps run."""
    sizes, real = [], tasks._record_losses

    def watched(adapted: Any, examples: Any, group: Any) -> torch.Tensor:
        sizes.append(len(group))
        return real(adapted, examples, group)

    case.monkeypatch.setattr(tasks, "_record_losses", watched)
    case.answer()
    assert set(sizes) == {1}


def a_name_with_control_characters_is_refused(case: Case) -> None:
    assert case.unread(run="a\x1fb") == RefusalReason.BAD_REQUEST


CHECKS: list[Callable[[Case], None]] = [
    each_record_runs_alone,
    a_name_with_control_characters_is_refused,
    the_owners_policy_comes_first,
    a_spent_budget_comes_first,
    one_round_has_one_reply,
    an_altered_reply_stays_here,
    a_round_has_one_request,
    each_attempt_is_paid,
    attempts_come_to_an_end,
    an_edited_ledger_is_refused,
    a_ledger_without_one_of_its_lines_is_refused,
    a_ledger_put_back_is_refused,
    a_foreign_ledger_is_refused,
    the_servers_echo_is_believed,
    the_server_is_a_witness,
    accuracy_is_paid_for,
    accuracy_is_noised,
    an_update_has_one_length,
    an_update_holds_nothing_else,
    an_exceptions_words_stay_inside,
]


def nothing(*anything: object, **named: object) -> None:
    return None


def _recorded_unread(self: DeployedNode, kept: object) -> bool:
    return True


def _paid_once(self: Ledger, run: str, number: int, *rest: object, **named: object) -> object:
    return self.find(run, number) or _real_debit(self, run, number, *rest, **named)


_real_debit = Ledger.debit


def _unsealed_unread(text: bytes, where: str) -> dict[str, Any]:
    fields = json.loads(text)
    fields.pop("digest")
    return fields


def _without_accuracy(mechanism: Any, sampling: Any, evaluation_noise: float | None, steps: int) -> Any:
    return _real_participation(mechanism, sampling, None, steps)


_real_participation = client_module.participation


def _in_batches(real: Any, **fields: Any) -> Any:
    return real(**{**fields, "alone": False})


def _mean(values: torch.Tensor, records: int, *anything: object, **named: object) -> float:
    return float(values.double().sum()) / records


def _tight(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


NODE, FORMAT, FRAME_VERSION, CLIENT = (
    "fedlora.deploy.node",
    "fedlora.privacy.ledger_format",
    "fedlora.transport.wire",
    "fedlora.training.client",
)

BROKEN: list[tuple[str, str, Any, Callable[[Case], None]]] = [
    ("no bounds on a request", f"{NODE}.DeployedNode._fault", nothing, the_owners_policy_comes_first),
    ("any code, any base model", f"{NODE}.DeployedNode._foreign", nothing, the_owners_policy_comes_first),
    ("records before the policy", f"{NODE}.DeployedNode._refused", nothing, the_owners_policy_comes_first),
    ("records before the budget", f"{NODE}.would_exceed", lambda *a: False, a_spent_budget_comes_first),
    ("replies are not looked up", f"{NODE}.Outbox.find", nothing, one_round_has_one_reply),
    ("replies are not kept", f"{NODE}.Outbox.keep", nothing, one_round_has_one_reply),
    ("replies are not compared", f"{NODE}.DeployedNode._recorded", _recorded_unread, an_altered_reply_stays_here),
    ("requests are not compared", f"{NODE}.request_digest", lambda request: "same", a_round_has_one_request),
    ("a retry is free", f"{NODE}.Ledger.debit", _paid_once, each_attempt_is_paid),
    ("retries for ever", "fedlora.privacy.ledger.MOST_ATTEMPTS", 99, attempts_come_to_an_end),
    ("digests are not checked", f"{FORMAT}._unsealed", _unsealed_unread, an_edited_ledger_is_refused),
    ("the chain is not checked", f"{FORMAT}._require_next", nothing, a_ledger_without_one_of_its_lines_is_refused),
    ("nobody remembers", f"{NODE}.require_reached", nothing, a_ledger_put_back_is_refused),
    ("the outbox is no witness", f"{NODE}.Outbox.furthest", nothing, a_ledger_put_back_is_refused),
    ("whose ledger is not asked", "fedlora.privacy.ledger._require_owner", nothing, a_foreign_ledger_is_refused),
    ("the echo is not read", "fedlora.transport.flower_client.echo_of", nothing, the_servers_echo_is_believed),
    ("the server objects to nothing", "fedlora.deploy.journal.Journal.objection", nothing, the_server_is_a_witness),
    ("records share batches", f"{NODE}.Node", partial(_in_batches, client_module.Node), each_record_runs_alone),
    ("alone is not heeded", f"{CLIENT}.ALONE", 2048, each_record_runs_alone),
    ("no name is looked at", f"{NODE}.DeployedNode._fault", nothing, a_name_with_control_characters_is_refused),
    ("accuracy is free", f"{CLIENT}.participation", _without_accuracy, accuracy_is_paid_for),
    ("accuracy is exact", f"{CLIENT}.private_mean", _mean, accuracy_is_noised),
    ("headers are not filled up", f"{FRAME_VERSION}._header", _tight, an_update_has_one_length),
    ("frames may hold more", f"{FRAME_VERSION}._require_the_one_way", nothing, an_update_holds_nothing_else),
    ("errors are logged as they are", f"{NODE}.without_records", str, an_exceptions_words_stay_inside),
]  # fmt: skip


@pytest.fixture
def case(config, request_one, tmp_path, caplog, monkeypatch) -> Case:
    return Case(config, request_one, tmp_path, caplog, monkeypatch)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_node_keeps_its_promise(case, check):
    check(case)


@pytest.mark.parametrize(("name", "target", "broken", "check"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_a_node_that_breaks_it_is_found_out(case, monkeypatch, name, target, broken, check):
    monkeypatch.setattr(target, broken)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(case)


def test_each_check_is_broken_by_something():
    assert {check for *_, check in BROKEN} == set(CHECKS)
