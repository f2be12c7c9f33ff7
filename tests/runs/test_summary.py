"""One summary for a simulation, a run under way and a server's run; what it says of privacy is what happened."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.config.load import load_config
from fedlora.config.schema import PrivateRuns, RunConfig
from fedlora.deploy.journal import Journal, Reported
from fedlora.deploy.server import serve
from fedlora.errors import ConfigError, LedgerError, PrivacyError
from fedlora.export.card import model_card
from fedlora.export.report import report_html
from fedlora.export.statement import SIMULATION, headline, privacy_statement
from fedlora.federation.store import Store
from fedlora.privacy import accountants
from fedlora.privacy.accountants import agreed_epsilon, epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import open_ledger
from fedlora.privacy.noise import BY_THE_NODES, SEEDED
from fedlora.runs.budgets import budgets
from fedlora.runs.evidence import accounts, require_debits
from fedlora.runs.promise import KEYS, promise
from fedlora.runs.rundir import (
    SPENT,
    Roster,
    finished_summary,
    require_simulation,
    run_config,
    run_rounds,
    save_roster,
)
from fedlora.runs.summary import run_status, run_summary, summary_so_far
from fedlora.runtime.simulate import simulate
from fedlora.values import ClientUpdate, Delta, DpEvent, Member, Reply, TrainRequest, Witness
from tests.deploy.test_journal import SOUNDNESS

CONTRACT = {
    *KEYS,
    *("rounds_completed", "clients", "participations", "metric", "score", "score_before", "private"),
    *("epsilon_max", "epsilon_by_client", "delta", "accountant", "noise_source", "method", "seconds"),
    *("client_rounds_per_second", "bytes_up_per_client_round", "bytes_down_per_client_round"),
    *("state_sha256", "execution", "versions"),
}
EVENT = DpEvent(noise_multiplier=1.5, sample_rate=0.1, steps=2, expected_batch=10.0, max_draw=95)
TOLD = DpEvent(noise_multiplier=20.0, sample_rate=1.0, steps=1)
WITNESS = Witness(seq=1, head="0" * 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("summary")


@pytest.fixture
def finished(folder: Path, tiny_config: Callable[..., RunConfig]) -> Path:
    """A simulation of one round that asked one of its three clients; the first test that needs it makes it."""
    if not (folder / "run").exists():
        simulate(tiny_config(federation__rounds=1, federation__cohort=1), folder / "run", lambda event: None)
    return folder / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


class Heard:
    """A cohort of two nodes, each of which spent one event."""

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        delta = Delta(basis=0, sites={})
        for client in clients:
            yield ClientUpdate(
                client=client, run="r", round=request.round, delta=delta, spent=(EVENT, TOLD), ledger=WITNESS
            )

    def close(self) -> None: ...


@pytest.fixture
def served(copied: Path) -> Path:
    """The same directory as a server leaves it: a roster and a journal, no ledgers, no summary yet."""
    shutil.rmtree(copied / "ledgers")
    (copied / "summary.json").unlink()
    asked = run_rounds(copied)[1]["asked"]
    members = tuple(Member(client=client, examples=100) for client in sorted({*asked, "site-z"}))
    save_roster(copied, Roster(run="r", members=members))
    state, _ = Store(copied).load()
    request = TrainRequest(run="r", base_model="m", code="c", round=1, adapters=state.adapters, work=None)  # type: ignore[arg-type]
    list(Reported(Heard(), Journal(copied / SPENT), SOUNDNESS).ask(asked, request))
    return copied


def summary_of_server(run_dir: Path) -> dict:
    state, _ = Store(run_dir).load()
    clients = list(json.loads((run_dir / "roster.json").read_text())["members"])
    return run_summary(run_dir, run_config(run_dir), clients=clients, state=state)


def test_every_summary_has_the_keys_of_the_contract(finished, served):
    whole, so_far, server = finished_summary(finished), summary_so_far(served), summary_of_server(served)
    assert whole is not None and set(whole) >= CONTRACT
    assert list(whole) == list(so_far) == list(server)


def test_a_run_under_way_tells_what_the_finished_one_will(finished, copied):
    whole = finished_summary(finished)
    (copied / "summary.json").unlink()
    so_far = summary_so_far(copied)
    later = ("bytes_up_per_client_round", "bytes_down_per_client_round", "state_sha256", "accountants_agree")
    later += ("epsilon_replace_one_max", "epsilon_replace_one_by_client")
    assert so_far["accountants_agree"] is None and so_far["epsilon_replace_one_max"] is None
    assert whole == {**so_far, **{key: whole[key] for key in later}}


def test_a_client_that_was_never_asked_has_spent_nothing(finished, served):
    found = finished_summary(finished)
    assert sorted(found["epsilon_by_client"]) == ["client-0", "client-1", "client-2"]
    assert sorted(found["epsilon_by_client"].values())[:2] == [0.0, 0.0] and found["epsilon_max"] > 0
    assert summary_of_server(served)["epsilon_by_client"]["site-z"] == 0.0


def test_a_simulation_says_so_wherever_its_epsilon_stands(finished):
    found, config = finished_summary(finished), run_config(finished)
    assert found["noise_source"] == SEEDED
    texts = (headline(found), model_card(config, found), report_html(found, run_rounds(finished), config))
    assert all(SIMULATION in text for text in texts)
    assert ("Noise", f"seeded ({SIMULATION})") in privacy_statement(found).terms


def test_a_servers_run_is_no_simulation_and_no_proof(served):
    found, config = summary_of_server(served), run_config(served)
    assert found["noise_source"] == BY_THE_NODES
    assert found["epsilon_max"] == epsilon([EVENT, TOLD], 1e-5) > 0
    texts = (headline(found), model_card(config, found), report_html(found, run_rounds(served), config))
    assert not any("SIMULATION" in text for text in texts)
    assert all("as the nodes report it" in text for text in texts)
    assert ("Noise", "drawn by each node; its own ledger is the authority") in privacy_statement(found).terms
    # The nodes' own budgets set the noise, so nothing is said of what the server's config asks for.
    assert "target 8" not in report_html(found, run_rounds(served), config)


def test_status_and_budget_read_what_the_nodes_report(served, capsys):
    asked = run_rounds(served)[1]["asked"][0]
    assert {client: account.debits for client, account in accounts(served).items()} == {
        asked: ((EVENT, TOLD),),
        "site-z": (),
    }
    assert main(["status", str(served), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon_max"] == epsilon([EVENT, TOLD], 1e-5)
    assert main(["status", str(served)]) == 0
    assert "give the same `fedlora serve` command again" in capsys.readouterr().out
    assert main(["budget", str(served)]) == 0
    told = capsys.readouterr().out
    assert "NOT PRIVATE" not in told and "each node's own ledger is the authority" in told
    assert "verified" not in told
    rows = {row["client"]: row for row in budgets(served)}
    assert rows[asked]["epsilon"] == epsilon([EVENT, TOLD], 1e-5) and rows["site-z"]["epsilon"] == 0.0
    assert not any(row["verified"] or row["left"] for row in rows.values())


def test_nobody_is_simulated_inside_a_servers_run(served, capsys, tmp_path):
    before = sorted(path for path in served.rglob("*"))
    with pytest.raises(ConfigError, match="a server's run: give the same `fedlora serve` command again"):
        require_simulation(served)
    config = str(served / "config.yaml")
    for command in (["resume", str(served)], ["simulate", config, "--run-dir", str(served)]):
        assert main(command) == 2
        assert "a server's run: give the same `fedlora serve` command again" in capsys.readouterr().err
    assert sorted(path for path in served.rglob("*")) == before


def test_no_server_goes_on_inside_a_simulation(copied):
    (copied / "summary.json").unlink()
    config = load_config(copied / "config.yaml", [f"output={json.dumps(str(copied))}"])
    with pytest.raises(ConfigError, match="holds a simulation"):
        serve(None, config)  # type: ignore[arg-type]
    assert not (copied / "roster.json").exists()


def test_a_server_that_never_met_its_nodes_leaves_no_run_that_could_be_resumed(tiny_config, tmp_path):
    config = tiny_config(data__partition={"kind": "column", "column": "site"})
    with pytest.raises(ConfigError, match=r"data.partition.clients"):
        serve(None, config)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="holds no run"):
        run_config(Path(config.output))


def test_an_epsilon_that_two_accountants_confirm_is_what_a_finished_run_says(finished):
    found = finished_summary(finished)
    held = accounts(finished)
    assert found["accountants_agree"] is True and (found["unit"], found["adjacency"]) == (
        "record",
        "zero-out",
    )
    for client, account in held.items():
        assert found["epsilon_by_client"][client] == agreed_epsilon(account.events, 1e-5)
        assert found["epsilon_replace_one_by_client"][client] == epsilon(
            account.events, 1e-5, "pld", "replace-one"
        )
    assert found["epsilon_replace_one_max"] == max(found["epsilon_replace_one_by_client"].values())
    assert found["epsilon_replace_one_max"] > found["epsilon_max"]


def test_a_run_on_whose_ledger_accountants_disagree_does_not_finish(copied, monkeypatch):
    """The mutation of the check: an accountant that is off by a tenth is noticed at the end."""
    real = accountants.epsilon
    monkeypatch.setattr(
        accountants,
        "epsilon",
        lambda events, delta, name="pld": real(events, delta, name) * (0.9 + 0.2 * (name == "pld")),
    )
    with pytest.raises(PrivacyError, match="accountants disagree"):
        promise(run_config(copied).privacy, copied, ["client-0"], finished=True)


def test_what_a_node_says_cannot_keep_a_servers_run_from_its_end(served):
    journal = served / SPENT
    words = json.loads(journal.read_text())
    words["spent"] = [[0.03, 1.0, 9, None, None]]
    journal.write_text(json.dumps(words) + "\n")
    found = summary_of_server(served)
    assert found["accountants_agree"] is False and found["epsilon_max"] > 300
    assert found["lost_attempts"] is None


def test_every_participation_is_counted_once_however_many_events_it_has(served, finished):
    """A debit holds training and a private evaluation; a lost attempt is a debit too."""
    asked = run_rounds(served)[1]["asked"][0]
    found = summary_of_server(served)
    assert found["debits_by_client"] == {asked: 1, "site-z": 0}
    assert {row["client"]: row["participations"] for row in budgets(served)} == {asked: 1, "site-z": 0}
    assert found["evaluation"] == {
        "releases_max": 1,
        "noise_min": TOLD.noise_multiplier,
        "epsilon_max_without": epsilon([EVENT], 1e-5),
    }
    assert (
        finished_summary(finished)["evaluation"] is None and finished_summary(finished)["lost_attempts"] == 0
    )


def test_an_answer_without_its_debit_is_unknown_though_other_debits_hold_two_events(tiny_config, tmp_path):
    """Counting events would let one debit of two events vouch for two answers."""
    run = tmp_path / "two"
    simulate(
        tiny_config(federation__rounds=2, federation__cohort=3, privacy__evaluation_noise=20.0), run, print
    )
    lines = run_rounds(run)
    assert all(set(line["accuracy_told"]) == set(line["answered"]) for line in lines)
    assert "as told with noise" in report_html(summary_so_far(run), lines, run_config(run))
    path = run / "ledgers" / "client-0.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    for tell in (lambda: require_debits(run_config(run), run), lambda: summary_so_far(run)):  # it is finished
        with pytest.raises(LedgerError, match="client-0 answered 2 rounds, but debits are there of 1"):
            tell()
    assert run_status(run)["epsilon_by_client"]["client-0"] is None
    (row,) = [row for row in budgets(run) if row["client"] == "client-0"]
    assert (row["participations"], row["epsilon"], row["verified"]) == (2, None, False)


def test_no_report_is_made_of_accounts_that_are_short(served):
    """Less than was spent is never told: the statement of such a run would be false."""
    assert summary_so_far(served)["epsilon_max"] > 0
    (served / SPENT).unlink()
    for tell in (summary_so_far, summary_of_server):
        with pytest.raises(
            LedgerError, match=r"spent.jsonl: .* answered 1 rounds, but debits are there of 0"
        ):
            tell(served)
    assert run_status(served)["epsilon_max"] is None


def test_the_cost_of_tuning_is_computed_from_the_ledgers(copied):
    """I-40: so many runs like this one are so many times its events; nothing else changes."""
    private = run_config(copied).privacy
    runs = private.model_copy(update={"tuned_on": PrivateRuns(private_runs=4)})
    undeclared, found = (promise(terms, copied, [], finished=True) for terms in (private, runs))
    dearest = max(epsilon(account.events * 4, 1e-5) for account in accounts(copied).values())
    assert found["tuning"] == {"tuned_on": "private runs", "private_runs": 4, "epsilon_max": dearest}
    assert {**found, "tuning": undeclared["tuning"]} == undeclared
    assert undeclared["tuning"]["tuned_on"] == "undeclared"


def test_the_summary_of_a_private_run_follows_its_ledgers_and_not_its_config(copied):
    """I-44, and its mutation: other events in a ledger change every figure; another target changes none."""
    private = run_config(copied).privacy
    before = promise(private, copied, [], finished=True)
    boast = private.model_copy(update={"target_epsilon": 0.1, "max_participations": 99, "max_grad_norm": 7.0})
    assert promise(boast, copied, [], finished=True) == before
    (path,) = (copied / "ledgers").glob("*.jsonl")
    name = path.stem
    path.unlink()
    book = open_ledger(path, client=name, dataset_fingerprint="d", noise_kind=SEEDED)
    book.debit("other", 1, "request", (EVENT, TOLD), max_grad_norm=1.0, budget=Budget.of(private))
    after = promise(private, copied, [], finished=True)
    assert after["epsilon_max"] == epsilon([EVENT, TOLD], 1e-5) != before["epsilon_max"]
    for key in ("epsilon_by_client", "epsilon_replace_one_max", "training", "evaluation"):
        assert after[key] != before[key], key


def test_seeded_noise_is_stamped_into_ledger_checkpoint_summary_report_and_card(finished, tmp_path):
    """I-23."""
    (path,) = (finished / "ledgers").glob("*.jsonl")
    header = json.loads(path.read_text().splitlines()[0])
    assert (header["noise"], header["unit"], header["adjacency"]) == (SEEDED, "record", "zero-out")  # I-7
    found, config = finished_summary(finished), run_config(finished)
    assert found["noise_source"] == SEEDED
    assert SIMULATION in report_html(found, run_rounds(finished), config)
    assert SIMULATION in model_card(config, found)
    state, line = Store(finished).load()
    Store(tmp_path, "r", SEEDED).begin(state, line)
    (words,) = (tmp_path / "checkpoints").glob("*/state.json")
    assert json.loads(words.read_text())["noise"] == SEEDED
