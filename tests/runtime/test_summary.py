"""One summary for a simulation, a run under way and a server's run; what it says of privacy is what happened."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.config.load import load_config
from fedlora.config.schema import RunConfig
from fedlora.errors import ConfigError
from fedlora.export.card import model_card
from fedlora.export.report import report_html
from fedlora.export.statement import SIMULATION, calibrated_for, headline, privacy_statement
from fedlora.federation.store import Store
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.noise import BY_THE_NODES, SEEDED
from fedlora.runtime.budgets import budgets
from fedlora.runtime.journal import Reported
from fedlora.runtime.rundir import (
    SPENT,
    Roster,
    finished_summary,
    require_simulation,
    run_config,
    run_rounds,
    save_roster,
)
from fedlora.runtime.server import serve
from fedlora.runtime.simulate import simulate
from fedlora.runtime.summary import run_summary, spent_events, summary_so_far
from fedlora.values import ClientUpdate, Delta, DpEvent, Member, Reply, TrainRequest

CONTRACT = {
    *("rounds_completed", "clients", "participations", "metric", "score", "score_before", "private"),
    *("epsilon_max", "epsilon_by_client", "delta", "accountant", "noise_source", "method", "seconds"),
    *("client_rounds_per_second", "bytes_up_per_client_round", "bytes_down_per_client_round"),
    *("state_sha256", "execution", "versions"),
}
EVENT = DpEvent(noise_multiplier=1.5, sample_rate=0.1, steps=2)


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
            yield ClientUpdate(client=client, run="r", round=request.round, delta=delta, spent=EVENT)

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
    request = TrainRequest(run="r", round=1, adapters=state.adapters, work=None)  # type: ignore[arg-type]
    list(Reported(Heard(), copied / SPENT).ask(asked, request))
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
    later = ("bytes_up_per_client_round", "bytes_down_per_client_round", "state_sha256")
    assert whole == {**so_far, **{key: whole[key] for key in later}}


def test_a_client_that_was_never_asked_has_spent_nothing(finished, served):
    found = finished_summary(finished)
    assert sorted(found["epsilon_by_client"]) == ["client-0", "client-1", "client-2"]
    assert sorted(found["epsilon_by_client"].values())[:2] == [0.0, 0.0] and found["epsilon_max"] > 0
    assert summary_of_server(served)["epsilon_by_client"]["site-z"] == 0.0


def test_a_simulation_says_so_wherever_its_epsilon_stands(finished):
    found, config = finished_summary(finished), run_config(finished)
    assert found["noise_source"] == SEEDED
    assert calibrated_for(found, config) == 8.0
    texts = (headline(found), model_card(config, found), report_html(found, run_rounds(finished), config))
    assert all(SIMULATION in text for text in texts)
    assert ("Noise", f"seeded ({SIMULATION})") in privacy_statement(found).terms


def test_a_servers_run_is_no_simulation_and_no_proof(served):
    found, config = summary_of_server(served), run_config(served)
    assert found["noise_source"] == BY_THE_NODES
    assert found["epsilon_max"] == epsilon([EVENT], 1e-5) > 0
    texts = (headline(found), model_card(config, found), report_html(found, run_rounds(served), config))
    assert not any("SIMULATION" in text for text in texts)
    assert all("as the nodes report it" in text for text in texts)
    assert ("Noise", "drawn by each node; its own ledger is the authority") in privacy_statement(found).terms
    assert calibrated_for(found, config) is None  # the nodes' own budgets set the noise


def test_status_and_budget_read_what_the_nodes_report(served, capsys):
    asked = run_rounds(served)[1]["asked"][0]
    assert spent_events(served) == {asked: (EVENT,), "site-z": ()}
    assert main(["status", str(served), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon_max"] == epsilon([EVENT], 1e-5)
    assert main(["status", str(served)]) == 0
    assert "submit the server app again" in capsys.readouterr().out
    assert main(["budget", str(served)]) == 0
    told = capsys.readouterr().out
    assert "NOT PRIVATE" not in told and "each node's own ledger is the authority" in told
    assert "verified" not in told
    rows = {row["client"]: row for row in budgets(served)}
    assert rows[asked]["epsilon"] == epsilon([EVENT], 1e-5) and rows["site-z"]["epsilon"] == 0.0
    assert not any(row["verified"] or row["left"] for row in rows.values())


def test_nobody_is_simulated_inside_a_servers_run(served, capsys, tmp_path):
    before = sorted(path for path in served.rglob("*"))
    with pytest.raises(ConfigError, match="a server's run: submit the server app again"):
        require_simulation(served)
    config = str(served / "config.yaml")
    for command in (["resume", str(served)], ["simulate", config, "--run-dir", str(served)]):
        assert main(command) == 2
        assert "a server's run: submit the server app again" in capsys.readouterr().err
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
