"""`fedlora forget`: what is erased, what stays, and that a kill at any moment changes nothing of either."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fedlora.algebra.deltas import add, scale
from fedlora.cli.app import main
from fedlora.cli.forget import erasers
from fedlora.data.holdings import open_holdings
from fedlora.deploy import journal as journal_module
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation import store as store_module
from fedlora.federation.memory import StaleMemory
from fedlora.federation.store import Store, state_digest
from fedlora.runs import forgetting
from fedlora.runs.rundir import locked
from fedlora.runtime.local import LocalCohort
from fedlora.runtime.prepare import prepare
from fedlora.runtime.simulate import resume, simulate
from tests.faults.kills import die

GONE = "client-1"


class StoppedError(Exception):
    """A run that is interrupted after a round."""


def stops_after(number):
    def listener(event):
        if (
            getattr(event, "round", {})
            and not isinstance(event.round, int)
            and event.round["round"] == number
        ):
            raise StoppedError

    return listener


@pytest.fixture
def stopped(tiny_config, tmp_path):
    """A simulation of four rounds, three of which are done; each client was heard."""
    config = tiny_config(
        privacy="none", federation__rounds=4, method__stale__beta=0.5, federation__weighting="examples"
    )
    with pytest.raises(StoppedError):
        simulate(config, tmp_path / "run", stops_after(3))
    assert set(Store(tmp_path / "run").load()[0].remembered) == {"client-0", "client-1", "client-2"}
    return tmp_path / "run"


def forget(run_dir, client=GONE):
    return forgetting.forget(run_dir, client, erasers(run_dir))


def mine(run_dir):
    """Bytes that only a remembered update of the withdrawn client has."""
    at = Store(run_dir).load()[0].remembered[GONE]
    delta = StaleMemory(run_dir / "memory.sqlite").recall(GONE, at)
    return max(delta.sites.values(), key=torch.numel)[:8].contiguous().numpy().tobytes()


def files(run_dir):
    return {path.relative_to(run_dir): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def require_sum(run_dir, counted=lambda at: 1.0):
    """The running sum is that of what is remembered of those who are left, whose shares are of them alone."""
    state, config = Store(run_dir).load()[0], forgetting.run_config(run_dir)
    members = forgetting.remaining(run_dir, forgetting._members(run_dir, config))
    share = forgetting.weights(members, "examples")
    total, memory = scale(state.memory, 0.0), StaleMemory(run_dir / "memory.sqlite")
    for client, at in state.remembered.items():
        total = add(total, memory.recall(client, at), share[client] * counted(at))
    for site in total.sites:
        # float32, a few sums of numbers up to about 1.
        assert_close(state.memory.sites[site], total.sites[site], rtol=1e-5, atol=1e-6)


def test_a_forgotten_client_is_nowhere_and_the_run_goes_on_without_it(stopped, capsys):
    needle, before = mine(stopped), Store(stopped).load()[0]
    assert any(needle in held for held in files(stopped).values())
    assert main(["forget", str(stopped), GONE, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["records"] >= 1 and told["left"] == 2 and not told["already"] and not told["unlearned"]
    assert not any(needle in held for held in files(stopped).values())
    after = Store(stopped).load()[0]
    assert state_digest(after) == state_digest(before) and after.round == 3
    assert set(after.remembered) == {"client-0", "client-2"}
    require_sum(stopped)
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["round-000003-without-001"]
    assert main(["forget", str(stopped), GONE]) == 0
    assert "forgotten already; nothing was done" in (said := capsys.readouterr().out)
    assert "nothing is unlearned" in said
    resume(stopped, lambda event: None)
    lines = [json.loads(line) for line in (stopped / "rounds.jsonl").read_text().splitlines()]
    assert lines[4]["asked"] == ["client-0", "client-2"] and len(lines) == 5
    require_sum(stopped)
    summary = json.loads((stopped / "summary.json").read_text())
    assert GONE in summary["participations"]
    assert [path.name for path in sorted((stopped / "checkpoints").iterdir())] == [
        "round-000003-without-001",
        "round-000004",
    ]


@pytest.mark.parametrize("stale", [{"rule": "mifa", "beta": 1.0}, {"beta": 0.5, "scale_by_rate": True}])
def test_where_updates_count_by_their_rates_a_forgotten_one_is_subtracted_as_it_counted(
    tiny_config, tmp_path, stale
):
    optimizer = {"name": "sgd", "lr": 1.0, "decay": "linear"}
    config = tiny_config(
        privacy="none", federation__rounds=4, method__stale=stale, federation__weighting="examples",
        federation__optimizer=optimizer,
    )  # fmt: skip
    with pytest.raises(StoppedError):
        simulate(config, tmp_path / "run", stops_after(3))
    forget(tmp_path / "run")
    require_sum(tmp_path / "run", lambda at: 4 / (4 - at + 1))


def test_the_hosts_of_a_run_that_goes_on_are_given_no_record_of_a_forgotten_client(stopped):
    held = []

    def start(setup, listener):
        held.append(open_holdings(setup.holdings))
        return LocalCohort(setup, listener)

    everybody = prepare(forgetting.run_config(stopped), lambda event: None).clients.examples
    forget(stopped)
    resume(stopped, lambda event: None, start)
    left = [everybody[client] for client in ("client-0", "client-2")]
    assert list(held[0]) == ["client-0", "client-2"]
    # The arrays, whoever may be said to own a part of them.
    for name in ("input_ids", "labels"):
        wanted = np.concatenate([getattr(one, name) for one in left])
        assert np.array_equal(getattr(held[0].examples, name), wanted)


def nth_call(owner, name, number):
    """The process is gone once `owner.name` was called so often."""
    real, left = getattr(owner, name), [number]

    def step(*arguments, **named):
        result = real(*arguments, **named)
        left[0] -= 1
        if not left[0]:
            die()
        return result

    setattr(owner, name, step)


KILLS = {
    "named": (forgetting, "_save", 1),
    "recalled": (StaleMemory, "recall", 1),
    "tensors aside": (store_module, "save_file", 1),
    "words aside": (store_module, "write_durably", 1),
    "checkpoint there": (Store, "_write", 1),
    "one older gone": (shutil, "rmtree", 3),
    "both older gone": (shutil, "rmtree", 4),
    "records gone": (StaleMemory, "forget", 1),
    "memory done": (Store, "forget", 1),
    "updates gone": (journal_module, "erase_updates", 1),
    "all done": (forgetting, "_save", 2),
}


def test_a_kill_at_any_moment_and_the_command_again_ends_the_same(stopped, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(stopped, whole)
    forget(whole)
    wanted = {name: held for name, held in files(whole).items() if name.name != "memory.sqlite"}
    for point, (owner, name, number) in KILLS.items():
        run_dir = tmp_path / point.replace(" ", "-")
        shutil.copytree(stopped, run_dir)
        child = os.fork()
        if child == 0:
            nth_call(owner, name, number)
            forget(run_dir)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point
        if point != "all done":
            with pytest.raises(
                IncompleteError, match=f"forgotten by half; give again: fedlora forget .* {GONE}"
            ):
                forgetting.remaining(run_dir, ())
        assert forget(run_dir).already == (point == "all done")
        found = {name: held for name, held in files(run_dir).items() if name.name != "memory.sqlite"}
        assert found == wanted, point
        assert GONE.encode() not in (run_dir / "memory.sqlite").read_bytes()
        require_sum(run_dir)


def test_what_cannot_be_forgotten_is_refused_and_nothing_is_changed(stopped, tiny_config, tmp_path, capsys):
    before = files(stopped)
    with pytest.raises(ConfigError, match=r"'nobody' is no client of .*'client-0', 'client-1', 'client-2'"):
        forget(stopped, "nobody")
    with locked(stopped), pytest.raises(ConfigError, match="being worked on by another process"):
        forget(stopped)
    with pytest.raises(ConfigError, match="holds no run"):
        forget(tmp_path)
    assert files(stopped) == before
    forget(stopped, "client-0")
    before = files(stopped)
    assert main(["forget", str(stopped), GONE]) == 2
    said = capsys.readouterr().err
    assert "1 clients are left and federation.cohort asks 2" in said and "nothing was changed" in said
    assert files(stopped) == before


def test_a_finished_run_is_erased_too_and_keeps_its_model(stopped, capsys):
    resume(stopped, lambda event: None)
    main(["report", str(stopped)])
    assert "Who holds what" in (stopped / "report.html").read_text()
    needle, summary = mine(stopped), (stopped / "summary.json").read_bytes()
    digest = state_digest(Store(stopped).load()[0])
    for client in (GONE, "client-0", "client-2"):  # nobody has to be left
        assert main(["forget", str(stopped), client]) == 0
    assert "finished; its model is as it was" in capsys.readouterr().out
    assert "Who holds what" not in (stopped / "report.html").read_text()
    assert not any(needle in held for held in files(stopped).values())
    state, _ = Store(stopped).load()
    assert state_digest(state) == digest and state.remembered == {}
    assert not any(bool(tensor.any()) for tensor in state.memory.sites.values())
    assert (stopped / "summary.json").read_bytes() == summary
    assert resume(stopped, lambda event: None) == stopped


def test_a_lost_record_is_not_subtracted_as_if_it_were_nothing(stopped):
    (stopped / "memory.sqlite").unlink()
    with pytest.raises(IncompleteError, match=f"'{GONE}'.* is missing; restore it"):
        forget(stopped)
    with pytest.raises(IncompleteError, match="forgotten by half"):
        resume(stopped, lambda event: None)


def test_a_checkpoint_that_a_kill_left_by_half_does_not_keep_the_client(tiny_config, tmp_path, monkeypatch):
    """The sum of the round that was to be committed is in it."""
    config = tiny_config(privacy="none", federation__rounds=3, method__stale__beta=0.5)
    real = store_module.write_durably

    def dying(path, content):
        if path.parent.name == ".round-000002.part":
            raise StoppedError
        real(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "write_durably", dying)
        with pytest.raises(StoppedError):
            simulate(config, tmp_path / "run", lambda event: None)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / ".round-000002.part" / "state.safetensors").exists()
    forget(tmp_path / "run")
    assert [path.name for path in checkpoints.iterdir()] == ["round-000001-without-001"]
    resume(tmp_path / "run", lambda event: None)
