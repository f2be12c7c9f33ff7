"""A client that withdraws between two lives of a server: the next one goes on without it, though its node is there."""

import json

import pytest

from fedlora.cli.app import main
from fedlora.deploy.replay import replay
from fedlora.disk import whole_lines
from fedlora.errors import ConfigError
from fedlora.federation.store import Store
from fedlora.runs.rundir import SPENT
from fedlora.transport.wire import decode_reply
from tests.faults.points import POINTS
from tests.faults.server import fixture_of_loaded, fixture_of_served

loaded, served = fixture_of_loaded, fixture_of_served


@pytest.mark.parametrize("point", ["S2 reply journalled", "S5c memory stored", "S8 line written"])
def test_a_withdrawn_client_leaves_a_servers_run_in_mid_round_and_the_rest_goes_on(served, point, capsys):
    run = served(clients=3, federation__cohort=2)
    assert run.live(prepare=POINTS[point]).killed
    run.settle()
    gone = sorted(Store(run.run_dir).load()[0].remembered)[0]
    lines = (run.run_dir / SPENT).read_bytes()
    assert main(["forget", str(run.run_dir), gone, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["records"] >= 1 and told["updates"] >= 1 and told["left"] == 2
    assert (run.run_dir / SPENT).read_bytes() == lines
    before = len(whole_lines(run.run_dir / "rounds.jsonl"))
    life = run.live()
    assert life.status == 0, life.error
    rounds = whole_lines(run.run_dir / "rounds.jsonl")
    assert len(rounds) == 4
    # Who was asked after it had gone is asked no more, and nothing that it said before counts.
    for line in rounds[before:]:
        assert gone not in line["asked"] and gone not in line["answered"]
    assert gone not in Store(run.run_dir).load()[0].remembered
    assert gone.encode() not in (run.run_dir / "memory.sqlite").read_bytes()
    frames = [decode_reply(path.read_bytes()) for path in (run.run_dir / "replies").glob("*.frame")]
    assert frames and gone not in {update.client for update in frames}
    # What it released stays counted.
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["epsilon_by_client"][gone] > 0 and summary["participations"][gone] >= 1
    with pytest.raises(ConfigError, match=f"'{gone}'.* are erased, so its rounds cannot be played again"):
        next(replay(run.run_dir))
