"""Whole runs in which each client goes on from its own B (FedSA-LoRA)."""

import json
import os
import shutil
import signal
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from fedlora.cli.app import main
from fedlora.cli.output import summary_text
from fedlora.errors import ConfigError
from fedlora.federation.events import ClientDone, RoundDone
from fedlora.federation.store import Store
from fedlora.privacy.ledger import Ledger, read_ledger
from fedlora.runs.own_b import own_adapters
from fedlora.runs.partition_picture import load_picture
from fedlora.runs.rundir import PERSONAL
from fedlora.runtime.prepare import prepare
from fedlora.runtime.simulate import resume, simulate
from fedlora.training import client as client_module
from fedlora.training.personal import Personal
from tests.e2e.interrupt import Interrupt
from tests.faults.kills import dies_after

AB = {"lora__trains": "ab", "privacy__accountant": "rdp"}  # the quickest to calibrate by
FEDSA = {**AB, "method": {"name": "fedsa"}}
FEDIT = {**AB, "method": {"name": "fedit"}}
CLIENTS = ("client-0", "client-1", "client-2")


def quiet(event: object) -> None:
    """Nothing is told."""


def told(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


def events(run_dir):
    return {
        path.name: [d.events for d in read_ledger(path).debits] for path in (run_dir / "ledgers").iterdir()
    }


def shares(run_dir):
    picture = load_picture(run_dir)
    records = {
        client: sum(counts) for client, counts in zip(picture["clients"], picture["counts"], strict=True)
    }
    return {client: held / sum(records.values()) for client, held in records.items()}


def left(run_dir):
    """All that must not depend on how the run came to its end."""
    own = {str(path.relative_to(run_dir)): path.read_bytes() for path in (run_dir / PERSONAL).rglob("*.*")}
    summary = told(run_dir)
    return own, events(run_dir), summary["state_sha256"], summary["epsilon_by_client"], summary["personal"]


def test_the_servers_b_is_the_mean_of_what_clients_keep_and_a_run_costs_what_fedit_costs(
    tiny_config, tmp_path
):
    run_dir, plain = tmp_path / "fedsa", tmp_path / "fedit"
    for method, place in ((FEDSA, run_dir), (FEDIT, plain)):
        simulate(tiny_config(**method, federation__weighting="examples"), place, quiet)
    summary, fedit = told(run_dir), told(plain)
    assert summary["epsilon_by_client"] == fedit["epsilon_by_client"]
    assert events(run_dir) == events(plain) and len(events(run_dir)) == 3
    assert summary["state_sha256"] != fedit["state_sha256"]
    assert "personal" not in fedit and not (plain / PERSONAL).exists()
    state, share = Store(run_dir).load()[0], shares(run_dir)
    own = {client: own_adapters(run_dir, client) for client in CLIENTS}
    for site, factors in state.adapters.sites.items():
        mean = sum(share[client] * own[client].sites[site].b for client in CLIENTS)
        assert_close(factors.b, mean, rtol=1e-4, atol=1e-6)  # sums of float32, of some rounds
        assert factors.b.abs().max() > 1e-3
        assert all(torch.equal(own[client].sites[site].a, factors.a) for client in CLIENTS)
        assert not torch.equal(own[CLIENTS[0]].sites[site].b, own[CLIENTS[1]].sites[site].b)
    scores = summary["personal"]
    assert set(scores) == set(CLIENTS) and summary["personal_mean"] == pytest.approx(sum(scores.values()) / 3)
    assert f"{100 * summary['personal_mean']:.1f} % in the mean of 3" in summary_text(summary, run_dir)


@pytest.mark.slow  # Ray starts
def test_ray_ends_in_the_state_and_the_bs_of_the_local_reference(tiny_config, tmp_path):
    simulate(tiny_config(**FEDSA), tmp_path / "local", quiet)
    ray = {"kind": "ray", "workers": 2, "clients_together": 2}
    simulate(tiny_config(**FEDSA, runtime=ray), tmp_path / "ray", quiet)
    assert left(tmp_path / "ray") == left(tmp_path / "local")
    assert "one client after the other" in told(tmp_path / "ray")["execution"]


def test_an_interrupted_run_resumes_to_the_same_state_and_the_same_bs(tiny_config, tmp_path):
    config = tiny_config(**FEDSA)
    simulate(config, tmp_path / "whole", quiet)
    for kind, at in ((ClientDone, 0), (ClientDone, 3), (RoundDone, 1)):
        cut = tmp_path / f"{kind.__name__}-{at}"
        with pytest.raises(KeyboardInterrupt):
            simulate(config, cut, Interrupt(kind, at))
        resume(cut, quiet)
        assert left(cut) == left(tmp_path / "whole"), cut.name


def test_a_run_whose_newest_checkpoint_is_damaged_does_two_rounds_again_from_the_bs_before_them(
    tiny_config, tmp_path
):
    config = tiny_config(**FEDSA, federation__cohort=3)
    simulate(config, tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", Interrupt(ClientDone, 7))  # in the midst of round 3
    damaged = tmp_path / "cut" / "checkpoints" / "round-000002" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"\0" * 8)
    resume(tmp_path / "cut", quiet)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_an_update_that_comes_too_late_has_moved_its_clients_b_and_not_the_servers(tiny_config, tmp_path):
    speeds = tmp_path / "speed.csv"
    speeds.write_text(
        "client,seconds\n" + "".join(f"{c},{s}\n" for c, s in zip(CLIENTS, (1, 2, 150), strict=True))
    )
    world = {"speed": {"kind": "file", "path": str(speeds)}}
    config = tiny_config(**FEDSA, federation__cohort=3, federation__deadline_s=100.0, world=world)
    simulate(config, tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "cut", Interrupt(RoundDone, 1))
    resume(tmp_path / "cut", quiet)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")
    assert told(tmp_path / "whole")["participations"][CLIENTS[2]] == 0
    state = Store(tmp_path / "whole").load()[0]
    for site, factors in state.adapters.sites.items():
        one, other, late = (own_adapters(tmp_path / "whole", client).sites[site].b for client in CLIENTS)
        assert_close(factors.b, (one + other) / 3, rtol=1e-4, atol=1e-6)
        assert late.abs().max() > 1e-3


KILLS = {
    "paid": (Ledger, "debit", 3),
    "in training": (client_module, "descend", 6),
    "its B kept": (Personal, "keep", 3),
    "reply made": (client_module, "update_of", 4),
    "committed": (Store, "commit", 2),
}


def killed_at_each_point(config, place):
    """In a process that never had threads, since those do not survive a fork: a run at each point, and its end."""
    prepare(config, quiet)  # so that the noise is calibrated once
    for point, (owner, name, calls) in KILLS.items():
        if (child := os.fork()) == 0:
            dies_after(owner, name, calls)
            simulate(config, place / point, quiet, scoring_threads=1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_state_and_the_same_bs(tiny_config, tmp_path):
    config = tiny_config(**FEDSA)
    simulate(config, tmp_path / "whole", quiet)
    child = get_context("spawn").Process(target=killed_at_each_point, args=(config, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 0
    for point in KILLS:
        assert not (tmp_path / point / "summary.json").exists()
        resume(tmp_path / point, quiet)
        assert left(tmp_path / point) == left(tmp_path / "whole"), point


@pytest.fixture
def stopped(tiny_config, tmp_path):
    """A run of which two rounds of three are done, by all three clients."""
    changes = {"federation__cohort": 3}
    with pytest.raises(KeyboardInterrupt):
        simulate(tiny_config(**FEDSA, **changes), tmp_path / "run", Interrupt(RoundDone, 1))
    return tmp_path / "run"


def test_a_run_does_not_go_on_without_a_clients_b_nor_with_a_damaged_one(stopped, capsys):
    directory = stopped / PERSONAL / CLIENTS[1]
    newest = max(directory.iterdir())
    kept, ledgers = newest.read_bytes(), events(stopped)
    newest.write_bytes(kept[:-1])
    with pytest.raises(ConfigError, match=f"{newest} is damaged"):
        resume(stopped, quiet)
    shutil.rmtree(directory)
    assert main(["resume", str(stopped)]) == 2
    assert f"{directory}: the B of round 2" in capsys.readouterr().err
    assert len(events(stopped)["client-1.jsonl"]) == len(ledgers["client-1.jsonl"])


def test_a_forgotten_client_keeps_no_b_and_the_others_go_on(tiny_config, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        simulate(tiny_config(**FEDSA, federation__rounds=4), tmp_path / "run", Interrupt(RoundDone, 2))
    assert {path.name for path in (tmp_path / "run" / PERSONAL).iterdir()} == set(CLIENTS)
    assert main(["forget", str(tmp_path / "run"), CLIENTS[1]]) == 0
    assert {path.name for path in (tmp_path / "run" / PERSONAL).iterdir()} == {CLIENTS[0], CLIENTS[2]}
    resume(tmp_path / "run", quiet)
    assert set(told(tmp_path / "run")["personal"]) == {CLIENTS[0], CLIENTS[2]}


def test_a_clients_own_model_is_exported_and_scored_as_the_summary_says(stopped, tmp_path, capsys):
    export = ["export", str(stopped), "--client", CLIENTS[2], "--to", str(tmp_path / "early")]
    assert main(export) == 0  # of a run that is under way, too: as it was after round 2
    resume(stopped, quiet)
    for client in (CLIENTS[2], None):
        to = tmp_path / str(client)
        whose = [] if client is None else ["--client", client]
        capsys.readouterr()
        assert main(["export", str(stopped), *whose, "--to", str(to), "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["client"] == client
        assert main(["evaluate", str(to), str(stopped / "config.yaml"), "--format", "json"]) == 0
        found, summary = json.loads(capsys.readouterr().out), told(stopped)
        wanted = summary["score"] if client is None else summary["personal"][client]
        assert found["score"] == pytest.approx(wanted, abs=1e-6)
        assert ("Whose B" in (to / "README.md").read_text()) == (client is not None)
    files = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("early", CLIENTS[2], "None")
    ]
    up = next(name for name in files[0] if "lora_B" in name)
    assert not torch.equal(files[0][up], files[1][up]) and not torch.equal(files[1][up], files[2][up])
    assert main([*export[:3], "nobody", "--to", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "'nobody' has no B of its own" in said and CLIENTS[0] in said and not (tmp_path / "x").exists()


def test_only_clients_with_a_b_of_their_own_have_a_model_to_export(tiny_config, tmp_path, capsys):
    plain = {"lora__trains": "ab", "method": {"name": "fedit"}, "privacy": "none", "federation__rounds": 1}
    simulate(tiny_config(**plain), tmp_path / "run", quiet)
    assert main(["export", str(tmp_path / "run"), "--client", CLIENTS[0], "--to", str(tmp_path / "x")]) == 2
    assert "clients of fedit have no B of their own; leave --client out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora__trains": "b"}, r"lora\.trains: b, but fedsa trains A and B; write ab"),
        ({"federation__participation": "importance"}, r"federation\.participation: .*write normalised"),
        ({"federation__server": {"name": "sgd", "lr": 0.5}}, r"federation\.server\.lr: 0\.5, .*write 1\.0"),
        ({"federation__server": {"name": "momentum", "lr": 1.0}}, r"federation\.server\.name: .*write sgd"),
        ({"federation__enough": 1, "world": {}}, r"federation\.enough: 1, but in fedsa late .*write null"),
        ({"federation__ranks": {"client-0": 1}}, r"federation\.ranks: .*lora\.trains is ab"),
        ({"lora__from_adapter": "x"}, r"lora\.from_adapter: x, but in fedsa .*or name: fedit"),
        ({"method": {"name": "fedsa", "stale": {"beta": 0.5}}}, r"method\.stale\.beta: 0\.5, .*write 0"),
    ],
)
def test_what_does_not_go_with_a_b_of_each_clients_own_is_refused(tiny_config, changes, says):
    with pytest.raises(ConfigError, match=says):
        tiny_config(**{**FEDSA, **changes})
