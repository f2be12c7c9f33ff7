"""Somebody's own ServerApp on Flower's `Strategy.start` ends where our own loop ends, or says why not."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid

from fedlora.config.method import Ffa
from fedlora.config.schema import Federation, Lora, RunConfig, Sgd
from fedlora.deploy.strategy import FedLoraStrategy
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.absorb import start
from fedlora.federation.store import state_digest
from fedlora.methods import build
from fedlora.runtime.host import Host
from fedlora.runtime.prepare import Prepared, prepare
from fedlora.runtime.simulate import simulate
from fedlora.transport.flower_client import frame_of
from fedlora.transport.flower_nodes import Nodes, meet
from fedlora.transport.wire import decode_request
from fedlora.values import Origin, Witness
from tests.runtime.test_flower import breaks, debit_of, federation, honest

LORA = Lora(r=2, lora_alpha=2, target_modules=["layer"])
WORK = Federation(
    rounds=3, cohort=2, local_steps=2, batch_size=5, optimizer=Sgd(name="sgd", lr=0.3, decay="linear")
)


@contextmanager
def hosted(prepared: Prepared, run_dir: Path) -> Iterator[tuple[Grid, Nodes]]:
    """The simulated clients of a run, each a node of Flower's engine."""
    host, alone = Host(prepared.save_for_hosts(run_dir)), threading.Lock()

    def answer(client: str, frame: bytes) -> bytes:
        with alone:  # one model, and the engine asks from threads
            return host.answer_frame(client, frame)

    clients = sorted(prepared.clients.examples)
    with federation([partial(answer, client) for client in clients], names=clients) as grid:
        nodes = Nodes(grid, lambda hello: True)
        meet(nodes, lambda hellos: len(hellos) == len(clients))
        # The test's nodes all say 10 records.
        for member in prepared.clients.members:
            nodes.hellos[member.client] = replace(nodes.hellos[member.client], records=member.examples)
        yield grid, nodes


def test_a_serverapp_of_ones_own_ends_in_the_state_of_the_local_reference(tiny_config, tmp_path):
    config: RunConfig = tiny_config(
        method={"name": "fedsvd", "stale": {"beta": 0.3}}, federation__weighting="examples"
    )
    local = simulate(config, tmp_path / "local", lambda event: None)
    prepared = prepare(config, lambda event: None)
    seen: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(number)
        return MetricRecord({"arrays": len(arrays)})

    with hosted(prepared, tmp_path / "flower") as (grid, nodes):
        strategy = FedLoraStrategy(
            nodes,
            prepared.first_state(),
            origin=prepared.origin,
            seed=config.seed,
            method=prepared.method,
            federation=config.federation,
        )
        rounds = config.federation.rounds
        result = strategy.start(grid, strategy.arrays(), rounds, timeout=60, evaluate_fn=evaluate)
    assert state_digest(strategy.state) == json.loads((local / "summary.json").read_text())["state_sha256"]
    assert result.arrays == strategy.arrays() and seen == [0, 1, 2, 3]
    assert [report.answered for report in strategy.reports] == [
        tuple(line["answered"])
        for line in map(json.loads, (local / "rounds.jsonl").read_text().splitlines()[1:])
    ]
    assert result.train_metrics_clientapp[3] == MetricRecord(
        {"asked": 2, "answered": 2, "refused": 0, "rejected": 0}
    )
    assert result.evaluate_metrics_clientapp == {}


@contextmanager
def plain(
    answers: list[Callable[[bytes], bytes]],
    names: list[str] | None = None,
    echoes: dict[str, list[Witness | None]] | None = None,
    work: Federation = WORK,
) -> Iterator[tuple[Grid, FedLoraStrategy]]:
    """A strategy over one layer of three outputs and four inputs, and a node for each answer."""
    method = build(Ffa(name="ffa"), LORA, 3)
    first = start({"layer": (3, 4)}, head={}, lora_cfg=LORA, method=method, dtype=torch.float32)
    with federation(answers, names, echoes) as grid:
        nodes = Nodes(grid, lambda hello: True)
        meet(nodes, lambda hellos: len(hellos) == len(answers))
        origin = Origin(run="r", base_model="b", code="c")
        yield (
            grid,
            FedLoraStrategy(nodes, first, origin=origin, seed=3, method=method, federation=work),
        )


def test_whatever_a_node_does_the_round_ends_and_the_report_says_who_was_absent():
    answers = [partial(honest, "site-0"), breaks, lambda frame: b"\x00" * 100, partial(honest, "site-1")]
    work = WORK.model_copy(update={"cohort": 4})
    with plain(answers, work=work) as (grid, strategy):
        strategy.start(grid, strategy.arrays(), 1, timeout=10)
    (report,) = strategy.reports
    assert report.answered == ("site-0",)
    assert report.refused == dict.fromkeys(["site-1", "site-2", "site-3"], "failed")


def test_the_summary_names_the_method(caplog):
    caplog.set_level("INFO", logger="fedlora")
    with plain([partial(honest, "site-0"), partial(honest, "site-1")]) as (_, strategy):
        strategy.summary()
    assert "run r: 2 members, cohort 2, ffa" in caplog.text


def test_too_few_answers_end_the_run_with_the_state_of_the_round_before():
    with plain([breaks, breaks]) as (grid, strategy):
        before = state_digest(strategy.state)
        with pytest.raises(IncompleteError, match=r"0 of 2 clients answered, federation\.min_clients is 1"):
            strategy.start(grid, strategy.arrays(), 1, timeout=10)
    assert state_digest(strategy.state) == before and strategy.reports == []


def test_arrays_of_somebody_else_and_a_second_start_are_refused():
    with plain([partial(honest, "site-0"), partial(honest, "site-1")]) as (grid, strategy):
        with pytest.raises(ConfigError, match=r"initial_arrays=strategy\.arrays\(\)"):
            strategy.start(grid, ArrayRecord(), 1, timeout=10)
        strategy.start(grid, strategy.arrays(), 1, timeout=10)
        with pytest.raises(ConfigError, match="1 rounds are done; one strategy is one run"):
            strategy.start(grid, strategy.arrays(), 1, timeout=10)
        with pytest.raises(IncompleteError, match="round 2 was not begun"):
            strategy.aggregate_train(2, [])


def test_a_node_is_told_how_far_its_ledger_had_come_and_how_hard_to_work():
    asked = []

    def noted(client: str, frame: bytes) -> bytes:
        asked.append(decode_request(frame))
        return honest(client, frame)

    echoes: dict[str, list[Witness | None]] = {}
    with plain([partial(noted, "site-0"), partial(noted, "site-1")], echoes=echoes) as (grid, strategy):
        strategy.start(grid, strategy.arrays(), 3, timeout=10)
    assert echoes["site-0"] == [None, debit_of("site-0", 1), debit_of("site-0", 2)]
    rates = {request.round: request.work.learning_rate for request in asked}
    assert rates == pytest.approx({1: 0.3, 2: 0.2, 3: 0.1}) and len(asked) == 6


def test_clients_are_never_asked_to_evaluate_and_only_those_online_to_train():
    with plain([partial(honest, "site-0"), partial(honest, "site-1")]) as (grid, strategy):
        arrays = strategy.arrays()
        strategy.nodes._ids["site-1"] = 4711  # as if it had gone
        messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
        assert len(messages) == 1 and decode_request(frame_of(messages[0].content)).round == 1
        assert list(strategy.configure_evaluate(1, arrays, ConfigRecord(), grid)) == []
        assert strategy.aggregate_evaluate(1, []) is None
