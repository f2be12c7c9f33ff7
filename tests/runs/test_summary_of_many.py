"""A run of thousands of clients tells of the few that matter, and looks again only at what has changed."""

from pathlib import Path
from typing import Any

import pytest

from fedlora.cli.budget import budget_text, verified_text
from fedlora.cli.follow import status_text
from fedlora.cli.output import MOST_ROWS
from fedlora.cli.run import preview_text
from fedlora.config.schema import RunConfig
from fedlora.errors import LedgerError
from fedlora.export.card import model_card
from fedlora.export.report import report_html
from fedlora.monitor.messages import MESSAGE_BYTES, status_message
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger, open_ledger
from fedlora.privacy.noise import SEEDED
from fedlora.runs import promise as promise_module
from fedlora.runs.evidence import accounts
from fedlora.runs.promise import Spending, privacy_summary
from fedlora.runs.verify import verified
from fedlora.runtime.check.answer import ClientPreview, Preview
from fedlora.values import DpEvent

MANY = 3_000
EVENT = DpEvent(noise_multiplier=1.5, sample_rate=0.1, steps=2, expected_batch=10.0, max_draw=95)
BUDGET = Budget(target_epsilon=8.0, target_delta=1e-5, max_participations=10, accountant="pld")
NAMES = [f"client-{number:06d}" for number in range(MANY)]
DEAREST = NAMES[-1]


def of_each(value: Any, dearest: Any) -> dict[str, Any]:
    return {**dict.fromkeys(NAMES, value), DEAREST: dearest}


@pytest.fixture
def crowd() -> dict[str, Any]:
    """summary.json of a run of many clients, of which the last alone took part; and how far it is."""
    spent, twice = of_each(0.0, 3.25), of_each(0.0, 4.5)
    return {
        "finished": True, "rounds": 1, "refusals": 0, "rejections": 0, "refusals_by_reason": {},
        "rounds_completed": 1, "clients": MANY, "participations": of_each(0, 1),
        "metric": "accuracy", "score": 0.75, "score_before": 0.25,
        "private": True, "epsilon_max": 3.25, "epsilon_by_client": spent,
        "epsilon_replace_one_max": 4.5, "epsilon_replace_one_by_client": twice,
        "delta": 1e-5, "accountant": "pld", "accountants_agree": True, "unit": "record", "adjacency": "zero-out",
        "noise_source": SEEDED, "debits_by_client": of_each(0, 1), "lost_attempts": 0,
        "training": {"steps_max": 2, "noise_multiplier_min": 1.5, "sample_rate_max": 0.1}, "evaluation": None,
        "tuning": {"tuned_on": "undeclared", "private_runs": None, "epsilon_max": None}, "method": "fedsvd",
        "seconds": 6.0, "client_rounds_per_second": 0.8, "bytes_up_per_client_round": 1,
        "bytes_down_per_client_round": 1, "state_sha256": "0" * 64, "execution": "local", "versions": {},
    }  # fmt: skip


def clients_in(text: str) -> int:
    return sum("client-0" in line for line in text.splitlines())


def require_short(text: str) -> None:
    """The dearest client and some others stand there, and how many do not."""
    assert DEAREST in text and clients_in(text) == MOST_ROWS and f"{MANY - MOST_ROWS:,} more" in text


def test_status_shows_the_dearest_clients_and_how_many_more_there_are(crowd):
    require_short(status_text("run", crowd, ""))


def test_a_card_shows_the_dearest_clients_and_how_many_more_there_are(crowd, tiny_config):
    require_short(model_card(tiny_config(), crowd))


def test_budget_and_its_proof_show_the_dearest_ledgers_and_count_all(tmp_path):
    limit = {
        "max_participations": 10,
        "target_epsilon": 8.0,
        "left": 1.0,
        "delta": 1e-5,
        "noise_source": SEEDED,
    }
    rows = [
        {"client": name, "epsilon": spent, "participations": 1, "verified": True, **limit}
        for name, spent in of_each(0.5, 3.25).items()
    ]
    text = budget_text(tmp_path, rows)
    require_short(text)
    assert f"chain verified: {MANY} participations" in text
    book = book_of(tmp_path / "ledgers", "a")
    pay(book, 1)
    (proof,) = verified(book.path)
    text = verified_text(
        tmp_path, [{**proof, "client": row["client"], "epsilon": row["epsilon"]} for row in rows]
    )
    require_short(text)
    assert f"in {MANY} ledgers" in text


def test_what_nobody_knows_comes_before_what_was_spent(tmp_path):
    limit = {"max_participations": 10, "target_epsilon": 8.0, "delta": 1e-5, "noise_source": SEEDED}
    rows = [
        {"client": n, "epsilon": e, "left": e, "participations": 1, "verified": e is not None, **limit}
        for n, e in of_each(0.5, None).items()
    ]
    assert DEAREST in budget_text(tmp_path, rows).splitlines()[1]


def test_a_preview_shows_the_smallest_clients_and_how_many_more_there_are():
    clients = tuple(
        ClientPreview(client=name, records=size, sample_rate=0.1, noise_multiplier=1.0, epsilon=1.0)
        for name, size in of_each(500, 100).items()
    )
    found = Preview(
        clients=clients, classes=(), trained_parameters=1, steps_per_participation=1, bytes_up=1, bytes_down=1,
        memory_bytes=1, training_seconds=1.0, notes=(),
    )  # fmt: skip
    require_short(preview_text(found))


def test_a_report_draws_the_clients_that_took_part_and_stays_small(crowd, tiny_config):
    rounds = [
        {
            "round": 0,
            "asked": [],
            "answered": [],
            "refused": {},
            "rejected": {},
            "score": 0.25,
            "seconds": 0.0,
        },
        {
            "round": 1,
            "asked": [DEAREST],
            "answered": [DEAREST],
            "refused": {},
            "rejected": {},
            "seconds": 6.0,
        },
    ]
    html = report_html(crowd, rounds, tiny_config())
    _, _, participation = html.partition("<h2>Participation</h2>")
    assert DEAREST in participation.partition("As a table")[0] and f"{MANY - 60:,} more" in participation
    assert len(html) < 200_000


def test_the_status_of_100000_clients_fits_into_a_message_of_the_monitor(crowd):
    more = {f"client-{number:06d}": 1.5 for number in range(100_000)}
    found = {**crowd, "participations": dict.fromkeys(more, 5), "epsilon_by_client": more}
    assert status_message(found).ByteSize() < MESSAGE_BYTES / 2


def book_of(ledgers: Path, client: str) -> Ledger:
    return open_ledger(ledgers / f"{client}.jsonl", client=client, dataset_fingerprint="d", noise_kind=SEEDED)


def pay(book: Ledger, number: int) -> None:
    book.debit("run", number, f"request {number}", (EVENT,), max_grad_norm=1.0, budget=BUDGET)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The ledgers that were read, by client."""
    found: list[str] = []
    real = promise_module.read_ledger
    monkeypatch.setattr(promise_module, "read_ledger", lambda path: (found.append(path.stem), real(path))[1])
    return found


def test_what_is_spent_by_now_is_what_all_ledgers_say_and_only_those_written_since_are_read(
    tmp_path, tiny_config, read
):
    config: RunConfig = tiny_config()
    spending = Spending(config.privacy, tmp_path)
    assert spending.epsilon_max() == 0.0
    books = {client: book_of(tmp_path / "ledgers", client) for client in "abc"}
    for number, paying in enumerate(["abc", "a", "", "ab", "c"], 1):
        for client in paying:
            pay(books[client], number)
        read.clear()
        spent = spending.epsilon_max()
        events = {client: account.events for client, account in accounts(tmp_path).items()}
        assert spent == privacy_summary(config.privacy, events)["epsilon_max"] > 0
        assert sorted(read) == sorted(paying)


def test_a_ledger_that_was_damaged_since_is_found_out_at_once(tmp_path, tiny_config):
    book = book_of(tmp_path / "ledgers", "a")
    pay(book, 1)
    spending = Spending(tiny_config().privacy, tmp_path)
    assert spending.epsilon_max()
    book.path.write_bytes(book.path.read_bytes().replace(b'"steps":2', b'"steps":1'))
    with pytest.raises(LedgerError, match="edited"):
        spending.epsilon_max()


def test_without_privacy_nothing_is_spent(tmp_path, tiny_config):
    assert Spending(tiny_config(privacy="none").privacy, tmp_path).epsilon_max() is None
