"""Whole runs on a tiny model: what lies on disk afterwards, and that it is the same however it came about."""

import json
from contextlib import nullcontext
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedlora.errors import ConfigError, IncompleteError, PrivacyError
from fedlora.federation.events import ClientDone, RoundDone
from fedlora.runs.rundir import HOLDINGS, STATES
from fedlora.runtime.check.measured import preview
from fedlora.runtime.simulate import resume, simulate
from tests.e2e.interrupt import Interrupt


def quiet(event: object) -> None: ...


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def ledger_lines(run_dir: Path) -> dict[str, list[dict]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((run_dir / "ledgers").glob("*.jsonl"))
    }


def test_a_run_leaves_what_the_contract_promises(tiny_config, tmp_path):
    run_dir = simulate(tiny_config(), tmp_path / "run", quiet)
    found = summary(run_dir)
    assert found["rounds_completed"] == 3
    assert found["private"] is True
    assert 0 < found["epsilon_max"] <= 8.0
    assert sum(found["participations"].values()) == 6
    assert len((run_dir / "rounds.jsonl").read_text().splitlines()) == 4
    assert found["noise_source"].startswith("seeded")
    assert (run_dir / "config.yaml").exists()
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["round-000002", "round-000003"]


def test_an_outside_accountant_confirms_epsilon_from_the_ledgers_alone(tiny_config, tmp_path):
    run_dir = simulate(tiny_config(), tmp_path / "run", quiet)
    found = summary(run_dir)
    for client, lines in ledger_lines(run_dir).items():
        outside = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
        for line in lines[1:]:
            for event in line["events"]:
                gaussian = dp_accounting.GaussianDpEvent(float(event["noise_multiplier"]))
                sampled = dp_accounting.PoissonSampledDpEvent(float(event["sample_rate"]), gaussian)
                outside.compose(sampled, int(event["steps"]))
        assert found["epsilon_by_client"][client] == pytest.approx(outside.get_epsilon(1e-5), rel=2e-3)
    assert found["epsilon_max"] == max(found["epsilon_by_client"].values())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_equal_seeds_end_in_equal_states_and_other_seeds_do_not(tiny_config, tmp_path, beta):
    config = tiny_config(method__stale={"beta": beta})
    first = summary(simulate(config, tmp_path / "one", quiet))
    again = summary(simulate(config, tmp_path / "two", quiet))
    other = summary(simulate(tiny_config(seed=8), tmp_path / "three", quiet))
    assert first["state_sha256"] == again["state_sha256"] != other["state_sha256"]


@pytest.mark.parametrize(
    ("kind", "at", "beta"),
    [
        (RoundDone, 0, 0.5),
        (ClientDone, 0, 0.5),
        (ClientDone, 3, 0.5),
        (RoundDone, 2, 0.5),
        (RoundDone, 1, "adaptive"),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_state_and_the_same_ledgers(
    tiny_config, tmp_path, kind, at, beta
):
    config = tiny_config(method__stale={"beta": beta})
    whole = simulate(config, tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", Interrupt(kind, at))
    cut = resume(tmp_path / "cut", quiet)
    assert summary(cut)["state_sha256"] == summary(whole)["state_sha256"]
    assert summary(cut)["epsilon_by_client"] == summary(whole)["epsilon_by_client"]
    rounds = [json.loads(line)["round"] for line in (cut / "rounds.jsonl").read_text().splitlines()]
    assert rounds == [0, 1, 2, 3]
    assert resume(cut, quiet) == cut  # finishing a finished run does nothing


@pytest.mark.parametrize("error", [None, IncompleteError, KeyboardInterrupt])
def test_no_record_lies_in_the_directory_of_a_run_that_is_not_at_work(tiny_config, tmp_path, error):
    """Nor what frozen layers made of one, once the run is finished; a run that goes on finds that again."""
    run_dir = tmp_path / "run"
    config = tiny_config(lora__layers_to_transform=[1], runtime={"kind": "local", "cache_prefix": True})
    during: set[tuple[bool, bool]] = set()

    def lies() -> tuple[bool, bool]:
        return (run_dir / HOLDINGS).exists(), any((run_dir / STATES).glob("*"))

    def look(event: object) -> None:
        if isinstance(event, ClientDone):
            during.add(lies())
            if error is not None and event.round == 2:
                raise error

    with nullcontext() if error is None else pytest.raises(error):
        simulate(config, run_dir, look)
    assert during == {(True, True)}
    assert lies() == (False, error is not None)
    resume(run_dir, quiet)
    assert lies() == (False, False)


def test_a_client_at_its_limit_refuses_and_the_round_goes_on(tiny_config, tmp_path):
    config = tiny_config(privacy__max_participations=1, federation__cohort=2, federation__rounds=2)
    run_dir = simulate(config, tmp_path / "run", quiet)
    second = json.loads((run_dir / "rounds.jsonl").read_text().splitlines()[2])
    assert list(second["refused"].values()) == ["budget"]
    assert len(second["answered"]) == 1
    assert {len(lines) - 1 for lines in ledger_lines(run_dir).values()} == {1}
    assert summary(run_dir)["epsilon_max"] <= 8.0


def test_a_round_that_nobody_answers_stops_the_run_and_keeps_the_model(tiny_config, tmp_path):
    config = tiny_config(privacy__max_participations=1, federation__cohort=3, federation__rounds=2)
    with pytest.raises(PrivacyError, match=r"^round 2: 0 of 3 clients answered.*budget"):
        simulate(config, tmp_path / "run", quiet)
    assert (tmp_path / "run" / "checkpoints" / "round-000001").is_dir()


def test_no_noise_can_meet_an_absurd_budget_and_nothing_is_written(tiny_config, tmp_path):
    for change in ({"privacy__target_epsilon": 1e-7}, {"privacy__target_delta": 0.5}):
        with pytest.raises(PrivacyError):
            simulate(tiny_config(**change), tmp_path / "run", quiet)
        assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_config_is_left_alone(tiny_config, tmp_path):
    run_dir = simulate(tiny_config(), tmp_path / "run", quiet)
    before = (run_dir / "summary.json").read_bytes()
    with pytest.raises(ConfigError, match=r"another config \(federation.rounds is 3 there, 4 here\)"):
        simulate(tiny_config(federation__rounds=4), tmp_path / "run", quiet)
    assert (run_dir / "summary.json").read_bytes() == before
    assert simulate(tiny_config(), tmp_path / "run", quiet) == run_dir


def test_without_privacy_nothing_pretends_to_be_private(tiny_config, tmp_path):
    config = tiny_config(
        privacy="none",
        data__partition={"kind": "iid", "clients": 3},
        federation__rounds=20,
        federation__local_steps=4,
        federation__cohort=3,
        federation__optimizer={"name": "sgd", "lr": 0.3},
    )
    found = summary(simulate(config, tmp_path / "run", quiet))
    assert found["private"] is False
    assert found["epsilon_max"] is None
    assert not (tmp_path / "run" / "ledgers").exists()
    assert found["score"] > found["score_before"] + 0.2  # the tiny task is learnable, so training does happen


def by_site(tiny_config, **changes):
    return tiny_config(data__partition={"kind": "column", "column": "site"}, **changes)


@pytest.mark.parametrize(
    "cohort",
    [4, {"probability": {"north": 0.5, "south": 0.5}}, {"probability": {"north": 0.5, "nowhere": 1.0}}],
)
def test_a_cohort_that_no_roster_can_fill_is_found_before_anything_is_written(tiny_config, tmp_path, cohort):
    with pytest.raises(ConfigError, match=r"federation\.cohort"):
        simulate(by_site(tiny_config, federation__cohort=cohort), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_one_client_for_each_value_of_a_column(tiny_config, tmp_path):
    found = summary(simulate(by_site(tiny_config), tmp_path / "run", quiet))
    assert set(found["participations"]) == {"north", "south", "east"}


def test_a_line_torn_by_a_crash_does_not_stop_a_resume(tiny_config, tmp_path):
    whole = simulate(tiny_config(), tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        simulate(tiny_config(), tmp_path / "cut", Interrupt(RoundDone, 1))
    with (tmp_path / "cut" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "answ')
    cut = resume(tmp_path / "cut", quiet)
    assert summary(cut)["state_sha256"] == summary(whole)["state_sha256"]


def test_a_damaged_checkpoint_is_left_for_the_one_before(tiny_config, tmp_path):
    config = tiny_config(method__stale={"beta": 0.5})
    whole = simulate(config, tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", Interrupt(RoundDone, 1))
    damaged = tmp_path / "cut" / "checkpoints" / "round-000002" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"\0" * 8)
    cut = resume(tmp_path / "cut", quiet)
    assert summary(cut)["state_sha256"] == summary(whole)["state_sha256"]
    assert summary(cut)["epsilon_by_client"] == summary(whole)["epsilon_by_client"]


def test_check_says_when_noise_is_for_more_rounds_than_anybody_can_be_asked_in(tiny_config):
    turns = {"federation__rounds": 4, "federation__cohort": 1, "federation__reshuffle": True}
    notes = preview(tiny_config(**turns, privacy__max_participations=4), lambda event: None).notes
    clients = tiny_config().data.partition.clients
    most = -(-4 // clients)
    assert any(f"write privacy.max_participations: {most}" in note for note in notes)
    fitting = preview(tiny_config(**turns, privacy__max_participations=most), lambda event: None).notes
    assert not any("nobody can be asked" in note for note in fitting)
