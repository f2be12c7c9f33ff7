"""A server that dies in mid-round asks nobody twice, and what it heard gives its every state again, bit for bit."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.config.load import dump_config
from fedlora.deploy.journal import Journal, Reported
from fedlora.deploy.node import DeployedNode
from fedlora.deploy.replay import replay
from fedlora.errors import IncompleteError
from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.store import Store, state_digest
from fedlora.methods import build
from fedlora.runs.beginning import first_state, origin
from fedlora.runs.rundir import SPENT, Roster, save_roster
from fedlora.training.load import load_model
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import Member, Reply, TrainRequest
from tests.damage import flipped
from tests.deploy.nodes import node_config
from tests.deploy.test_journal import SOUNDNESS

CLASSES = ("weather", "music", "kitchen")


class DiedError(Exception):
    """The server, of a power cut."""


class Sites:
    """A cohort of real nodes; the server dies once it has heard `hears` replies in this life."""

    def __init__(self, nodes: dict[str, DeployedNode], hears: int | None = None) -> None:
        self.nodes, self.left, self.asked = nodes, hears, []

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        frame = encode_request(request)
        for client in clients:
            if self.left == 0:
                raise DiedError
            self.left = None if self.left is None else self.left - 1
            self.asked.append((request.round, client))
            yield decode_reply(self.nodes[client].answer(frame))

    def close(self) -> None: ...


@pytest.fixture
def served(tmp_path, tiny_config, tiny_encoder, topic_files):
    """A server's directory and its nodes; `live` runs the rounds that are left, until the end or a death."""
    config = tiny_config(
        runtime={"kind": "flower"}, federation__cohort=2, federation__optimizer={"name": "sgd", "lr": 1.0},
        method={"name": "fedsvd", "stale": {"beta": 0.3}},
    )  # fmt: skip
    run_dir, nodes = Path(config.output), {}
    for name in ("site-0", "site-1"):
        (tmp_path / name).mkdir()
        own = node_config(tmp_path / name, tiny_encoder, topic_files[0], participations=5)
        nodes[name] = DeployedNode(own.model_copy(update={"client": name}))
    run_dir.mkdir()
    roster = Roster(run="once", members=tuple(Member(client=name, examples=360) for name in nodes))
    save_roster(run_dir, roster)
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "classes.json").write_text(json.dumps(CLASSES))
    model = load_model(config.model, config.task, config.lora, CLASSES, config.seed)
    first = first_state(config, model, build(config.method, config.lora, config.seed))

    def live(hears: int | None = None) -> tuple[Sites, list[tuple[int, str]]]:
        store, sites, done = Store(run_dir), Sites(nodes, hears), []
        if store.is_empty():
            store.begin(first, line_zero({}))
        try:
            for state, _ in rounds(
                store.recover(), origin=origin(config, roster.run), seed=config.seed,
                members=roster.members, method=build(config.method, config.lora, config.seed),
                federation=config.federation, cohort=Reported(sites, Journal(run_dir / SPENT), SOUNDNESS), store=store,
                score=lambda adapters: {},
            ):  # fmt: skip
                done.append((state.round, state_digest(state)))
        except DiedError:
            pass
        return sites, done

    return run_dir, live


@pytest.mark.fault("F2", "F3")
def test_a_server_that_died_in_mid_round_asks_only_those_it_had_not_heard(served):
    run_dir, live = served
    before, done = live(hears=3)  # round 1 whole, half of round 2
    assert [number for number, _ in done] == [1] and before.asked[-1] == (2, "site-0")
    after, rest = live()
    assert after.asked[0] == (2, "site-1") and (2, "site-0") not in after.asked
    assert [number for number, _ in rest] == [2, 3]
    assert list(replay(run_dir)) == [*done, *rest]


def test_the_command_prints_every_round_and_says_that_the_checkpoint_is_the_same(served, capsys):
    run_dir, live = served
    assert main(["replay", str(run_dir)]) == IncompleteError.exit_status  # nothing was done yet
    _, done = live()
    capsys.readouterr()
    assert main(["replay", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert [line.split() for line in said.splitlines()[1:-1]] == [[str(n), digest] for n, digest in done]
    assert "the same, bit for bit" in said


def test_the_command_finds_a_journal_of_which_a_line_was_taken_out(served, capsys):
    run_dir, live = served
    live()
    lines = (run_dir / SPENT).read_text().splitlines(keepends=True)
    (run_dir / SPENT).write_text("".join(lines[:-1]))
    assert main(["replay", str(run_dir)]) == IncompleteError.exit_status
    assert "something was changed: restore the directory" in capsys.readouterr().err


def test_a_replay_finds_an_update_that_was_changed(served):
    run_dir, live = served
    live()
    changed = sorted((run_dir / "replies").glob("*.frame"))[0]
    changed.write_bytes(flipped(changed.read_bytes()))
    with pytest.raises(IncompleteError, match="missing or damaged"):
        list(replay(run_dir))
