"""Whole runs in which clients train unequally many columns of B."""

import json
import logging

import pytest
import torch

from fedlora.federation.store import Store
from fedlora.privacy.ledger import read_ledger
from fedlora.runtime import prepare
from fedlora.runtime.host import ledger_path
from fedlora.runtime.simulate import simulate

MIXED = {"client-0": 1, "client-2": 3}
FOUR = {"lora": {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value"]}, "federation__cohort": 3}


def ran(config, run_dir):
    simulate(config, run_dir, lambda event: None)
    state, _ = Store(run_dir).load()
    return state, json.loads((run_dir / "summary.json").read_text())


def rounds_of(run_dir):
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow  # Ray starts
def test_unequal_ranks_end_in_one_state_in_every_runtime_and_cost_what_equal_ones_cost(
    tiny_config, tmp_path, caplog
):
    mixed = {**FOUR, "federation__ranks": MIXED}
    with caplog.at_level(logging.WARNING):
        together = {"kind": "local", "clients_together": 2}
        _, local = ran(tiny_config(**mixed, runtime=together), tmp_path / "local")
    assert "federation.ranks" in caplog.text and "one by one" in caplog.text
    _, ray = ran(tiny_config(**mixed, runtime={"kind": "ray", "workers": 2}), tmp_path / "ray")
    assert local["state_sha256"] == ray["state_sha256"]
    _, equal = ran(tiny_config(**FOUR), tmp_path / "equal")
    assert equal["state_sha256"] != local["state_sha256"]
    assert equal["epsilon_max"] == local["epsilon_max"]
    for number in range(3):
        paths = [ledger_path(tmp_path / place, f"client-{number}") for place in ("local", "equal")]
        one, other = ([debit.events for debit in read_ledger(path).debits] for path in paths)
        assert one == other and len(one) == 3
    for line in rounds_of(tmp_path / "local")[1:]:
        noise = line["noise_norm"]
        assert len(line["answered"]) == 3 and not line["rejected"]
        assert noise["client-0"] < noise["client-2"] < noise["client-1"]


@pytest.mark.parametrize(
    "method", [{"name": "fedsvd"}, {"name": "fedask"}, {"name": "ffa"}, {"name": "fedavg"}]
)
def test_columns_that_nobody_trains_are_never_moved(tiny_config, tmp_path, method):
    ranks = {"client-0": 1, "client-1": 2, "client-2": 2}
    init = {"lora__init": "kaiming"} if method["name"] == "fedavg" else {}
    config = tiny_config(
        **FOUR, **init, method=method, federation__ranks=ranks, federation__participation="importance"
    )
    state, _ = ran(config, tmp_path / "run")
    for factors in state.adapters.sites.values():
        change = (factors.b @ factors.a).double()
        values = torch.linalg.svdvals(change)
        # Where the basis turns, columns 3 and 4 stay empty: two directions at most were ever moved.
        assert float(values[2]) < 1e-5 * float(values[0])
        assert float(values[1]) > 1e-3 * float(values[0])


def test_a_rank_of_all_columns_changes_no_bit_of_a_run(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "run_name", lambda config: "0" * 16)  # so both draw the same records
    _, plain = ran(tiny_config(**FOUR), tmp_path / "plain")
    everybody = {f"client-{number}": 4 for number in range(3)}
    _, named = ran(tiny_config(**FOUR, federation__ranks=everybody), tmp_path / "named")
    assert plain["state_sha256"] == named["state_sha256"]
