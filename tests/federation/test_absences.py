"""A round that too few answered says who stayed away, why, and what of that is to be mended by whom."""

import json

import pytest

from fedlora.errors import IncompleteError, PrivacyError
from fedlora.federation.absences import MISSED, SHOWN, by_reason
from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.store import Store
from fedlora.values import Origin, Refusal, RefusalReason
from tests.federation.answering import ones


class Refusing:
    """A Cohort whose clients refuse for the reasons that they are given, and answer without one."""

    def __init__(self, **reasons: str):
        self.reasons = reasons

    def ask(self, clients, request):
        for client in clients:
            reason = self.reasons.get(client.replace("-", "_"))
            if reason is None:
                yield ones(client, request)
            else:
                code = RefusalReason(reason)
                yield Refusal(client=client, run=request.run, round=request.round, reason=code)

    def close(self):
        """Nothing is open."""


@pytest.fixture
def first_round(lab, tmp_path):
    """What becomes of a first round in which three are asked."""

    def play(least: int, **reasons: str):
        method, store = lab.method(), Store(tmp_path)
        state = lab.start(method)
        store.begin(state, line_zero({}))
        return next(rounds(
            state, origin=Origin(run="run", base_model="", code=""), seed=7, members=lab.members(3),
            method=method, federation=lab.federation(rounds=3, cohort=3, min_clients=least),
            cohort=Refusing(**reasons), store=store, score=lambda adapters: {},
        ))  # fmt: skip

    return play


def test_where_budgets_are_why_nobody_is_told_to_try_again(first_round, tmp_path):
    with pytest.raises(PrivacyError) as stopped:
        first_round(1, client_0="budget", client_1="budget", client_2="budget")
    said = str(stopped.value)
    assert said.startswith(
        "round 1: 0 of 3 clients answered, 1 have to (budget: client-0, client-1, client-2)"
    )
    assert "have `budget` in those node.yaml raised" in said and "are back" not in said
    missed = json.loads((tmp_path / MISSED).read_text())
    assert (missed["round"], missed["refused"]) == (1, dict.fromkeys(missed["asked"], "budget"))


def test_budgets_that_leave_enough_clients_who_may_come_back_end_in_an_incomplete_round(first_round):
    with pytest.raises(IncompleteError, match="resume the run when clients are back"):
        first_round(2, client_0="budget", client_1="failed")
    with pytest.raises(PrivacyError, match="budget: client-0; failed: client-1"):
        first_round(3, client_0="budget", client_1="failed")
    state, line = first_round(1, client_0="budget", client_1="budget")
    assert (state.round, line["answered"]) == (1, ["client-2"])


@pytest.mark.parametrize(
    ("reason", "move"),
    [
        ("bad_request", "does not allow what was asked: each node's own log says which key"),
        ("no_data", "`data` in those node.yaml"),
        ("ledger", "their ledgers are damaged or went back"),
        ("malformed", "have the same fedlora installed"),
    ],
)
def test_each_reason_has_its_own_next_move(first_round, reason, move):
    with pytest.raises(IncompleteError) as stopped:
        first_round(1, client_0=reason, client_1=reason, client_2=reason)
    assert move in str(stopped.value) and "are back" not in str(stopped.value)


def test_of_thousands_the_first_names_are_told():
    refused = {f"site-{number:04d}": "failed; ledger" for number in range(2000)}
    failed, ledger = by_reason(refused).split("; ")
    assert failed.endswith(f"site-{SHOWN - 1:04d} and 1,995 more") and ledger.startswith(
        "ledger: site-0000, "
    )
