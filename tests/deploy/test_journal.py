"""What a server keeps of what nodes say they spent: sound, once a round, and a witness of their ledgers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from fedlora.config.schema import Federation, Sgd
from fedlora.deploy import journal as journal_module
from fedlora.deploy.journal import Journal, Reported, erase_updates
from fedlora.deploy.soundness import Soundness
from fedlora.errors import ConfigError, IncompleteError
from fedlora.runs.evidence import reported
from fedlora.transport.wire import decode_reply, encode_reply
from fedlora.values import (
    Adapters,
    ClientUpdate,
    Delta,
    DpEvent,
    LocalWork,
    Member,
    Refusal,
    RefusalReason,
    Reply,
    TrainRequest,
    Witness,
)

SOUND = DpEvent(noise_multiplier=0.7, sample_rate=0.1, steps=2)
FEDERATION = Federation(rounds=9, cohort=1, local_steps=2, batch_size=4, optimizer=Sgd(name="sgd", lr=1.0))
SOUNDNESS = Soundness(federation=FEDERATION, max_grad_norm=None)
TOLD = DpEvent(noise_multiplier=50.0, sample_rate=1.0, steps=1)


def asked_in(number: int) -> TrainRequest:
    adapters = Adapters(basis=0, scale=1.0, sites={})
    work = LocalWork(steps=2, learning_rate=1.0)
    return TrainRequest(run="r", base_model="b", code="c", round=number, adapters=adapters, work=work)


class Claims:
    """A cohort of one node that says what it likes about what it spent, where, and what came of it."""

    def __init__(self, *spent: DpEvent) -> None:
        self.spent = spent
        self.seq: int | None = None
        self.value = 0.0

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        seq = 2 * request.round - 1 if self.seq is None else self.seq
        yield ClientUpdate(
            client="site-0",
            run="r",
            round=request.round,
            delta=Delta(basis=0, sites={"layer": torch.full((1, 1), self.value)}),
            spent=self.spent,
            ledger=Witness(seq=seq, head=f"{seq:064d}"),
        )

    def close(self) -> None: ...


def answered(
    cohort: Reported, claims: Claims, number: int, seq: int, value: float = 0.0
) -> RefusalReason | None:
    claims.seq, claims.value = seq, value
    *_, reply = cohort.ask(["site-0"], asked_in(number))  # what was heard in the round before comes first
    return reply.reason if isinstance(reply, Refusal) else None


@pytest.mark.parametrize(
    "claim",
    [
        *({"noise_multiplier": noise} for noise in (1e300, 1e-200, 1.1e4, 0.9e-2, float("nan"))),
        *({"steps": steps} for steps in (0, 3, 10**18)),
        *({"sample_rate": rate} for rate in (0.0, 1.1, float("nan"))),
    ],
)
def test_what_no_participation_can_spend_is_an_unsound_reply(tmp_path, claim):
    journal = Journal(tmp_path / "spent.jsonl")
    cohort = Reported(Claims(SOUND, replace(SOUND, **claim)), journal, SOUNDNESS)
    (reply,) = cohort.ask(["site-0"], asked_in(1))
    assert isinstance(reply, Refusal) and reply.reason == RefusalReason.UNSOUND
    assert not (tmp_path / "spent.jsonl").exists()


def test_a_torn_line_of_the_journal_does_not_spoil_the_next(tmp_path):
    journal = tmp_path / "spent.jsonl"
    members = [Member(client="site-0", examples=10)]
    cohort = Reported(Claims(SOUND, TOLD), Journal(journal), SOUNDNESS)
    for number in (1, 2, 3):
        list(cohort.ask(["site-0"], asked_in(number)))
        with journal.open("a") as file:
            file.write('{"client": "site-0", "rou')
        assert reported(journal, members)["site-0"].debits == ((SOUND, TOLD),) * number


def test_a_ledger_that_was_put_back_is_refused_also_after_a_restart_of_the_server(tmp_path, caplog):
    claims, journal = Claims(SOUND), tmp_path / "spent.jsonl"
    cohort = Reported(claims, Journal(journal), SOUNDNESS)
    assert answered(cohort, claims, 1, seq=1) is None
    assert answered(cohort, claims, 3, seq=7) is None
    for again in (cohort, Reported(claims, Journal(journal), SOUNDNESS)):
        assert again.journal.furthest("site-0") == Witness(seq=7, head=f"{7:064d}")
        assert again.journal.furthest("site-1") is None
        for number, seq in ((4, 5), (4, 7), (5, 1), (2, 7), (2, 9), (2, 1), (4, 0)):
            assert answered(again, claims, number, seq) == RefusalReason.LEDGER
        assert "put back" in caplog.text
        caplog.clear()
    assert len(journal.read_text().splitlines()) == 2
    assert answered(cohort, claims, 4, seq=9) is None


def test_late_replies_are_accepted_out_of_order(tmp_path):
    claims = Claims(SOUND)
    cohort = Reported(claims, Journal(tmp_path / "spent.jsonl"), SOUNDNESS)
    rounds = ((3, 5), (1, 1), (5, 9), (4, 7), (2, 3))
    assert [answered(cohort, claims, number, seq) for number, seq in rounds] == [None] * 5
    assert cohort.journal.furthest("site-0") == Witness(seq=9, head=f"{9:064d}")


@pytest.mark.fault("F22")
def test_a_round_is_answered_by_the_same_bytes_for_ever(tmp_path, caplog):
    claims, journal = Claims(SOUND), tmp_path / "spent.jsonl"
    cohort = Reported(claims, Journal(journal), SOUNDNESS)
    assert answered(cohort, claims, 1, seq=1, value=0.5) is None
    for again in (cohort, Reported(claims, Journal(journal), SOUNDNESS)):
        assert answered(again, claims, 1, seq=1, value=0.5) is None
        assert answered(again, claims, 1, seq=1, value=0.25) == RefusalReason.LEDGER
        assert answered(again, claims, 1, seq=3, value=0.5) == RefusalReason.LEDGER
    assert "released twice" in caplog.text


def test_a_reply_that_names_no_line_of_a_ledger_is_refused(tmp_path):
    class Silent(Claims):
        def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
            for reply in super().ask(clients, request):
                assert isinstance(reply, ClientUpdate)
                yield replace(reply, ledger=None)

    cohort = Reported(Silent(SOUND), Journal(tmp_path / "spent.jsonl"), SOUNDNESS)
    (reply,) = cohort.ask(["site-0"], asked_in(1))
    assert isinstance(reply, Refusal) and reply.reason == RefusalReason.LEDGER


@pytest.mark.parametrize(
    "line", ["{}", "no JSON", '{"client": "site-0", "round": 1, "ledger": null, "payload": ""}']
)
@pytest.mark.fault("F48")
def test_a_journal_of_another_version_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "spent.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match="not what this fedlora writes"):
        Journal(path)
    assert path.read_text() == line + "\n"


def test_erased_updates_leave_what_was_spent_and_where(tmp_path):
    """The frames of one client go, also of those that come later; its lines and the others' frames stay."""
    path, claims = tmp_path / "spent.jsonl", Claims(SOUND)
    journal = Journal(path)
    cohort = Reported(claims, journal, SOUNDNESS)
    for number in (1, 2):
        assert answered(cohort, claims, number, 2 * number - 1) is None
    (update,) = claims.ask(["site-0"], asked_in(2))
    journal.write(replace(update, client="site-1"), 2)
    lines, members = path.read_bytes(), [Member(client="site-0", examples=9)]
    account = reported(path, members)
    assert erase_updates(path, "site-0") == 2 and erase_updates(path, "site-0") == 0
    assert path.read_bytes() == lines and reported(path, members) == account
    again = Journal(path, {"site-0"})
    assert [update.client for update in again.heard(2)] == ["site-1"] and again.heard(1) == []
    assert again.furthest("site-0") == journal.furthest("site-0") is not None
    with pytest.raises(IncompleteError, match="missing or damaged"):
        Journal(path).heard(1)
    # One that was on its way: its budget is spent, its numbers are not kept.
    assert answered(Reported(claims, again, SOUNDNESS), claims, 3, 5) is None
    assert again.furthest("site-0") == Witness(seq=5, head=f"{5:064d}")
    assert len([*(tmp_path / "replies").iterdir()]) == 1
    assert [update.client for update in Journal(path, {"site-0"}).heard(3)] == []


def test_an_update_whose_line_was_never_written_is_erased_too(tmp_path, monkeypatch):
    """A server killed between the two leaves a frame that no line names, or half a frame."""

    class KilledError(Exception):
        pass

    def kill(*arguments: object) -> None:
        raise KilledError

    path, claims, replies = tmp_path / "spent.jsonl", Claims(SOUND), tmp_path / "replies"
    journal = Journal(path)
    assert answered(Reported(claims, journal, SOUNDNESS), claims, 1, 1) is None
    (update,) = claims.ask(["site-0"], asked_in(2))
    with monkeypatch.context() as patched:
        patched.setattr(journal_module, "append_durably", kill)
        for client in ("site-0", "site-1"):
            with pytest.raises(KilledError):
                journal.write(replace(update, client=client), 2)
    (replies / ".half.frame.part").write_bytes(encode_reply(update)[:-1])
    assert len([*replies.iterdir()]) == 4
    assert erase_updates(path, "site-0") == 2 and erase_updates(path, "site-0") == 0
    assert [decode_reply(file.read_bytes()).client for file in replies.iterdir()] == ["site-1"]
    assert erase_updates(path, "site-1") == 1 and not [*replies.iterdir()]
