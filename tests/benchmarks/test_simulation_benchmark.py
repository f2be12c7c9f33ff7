"""The peers of benchmarks/simulation.py do the work that we do, and its times are added up right."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BOUND = 0.8
"""Clips the records that the random head gets wrong, and not those that it gets right."""

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "at_scale"]:
        del sys.modules[name]


@pytest.fixture
def clients(tmp_path):
    """A peer's process with two clients of a tiny private case, eight records each, all of them drawn."""
    from at_scale.cases import Case
    from at_scale.material import make
    from at_scale.stock_work import Clients

    case = Case(
        name="two", megabytes=0.01, clients=2, asked=2, rounds=1, records=8, batch_size=8, arms=("flower",)
    )
    make(case, tmp_path / "material")
    config = tmp_path / "material" / "config.yaml"
    private = "target_epsilon: 8.0, target_delta: 1.0e-5, max_grad_norm: 0.05, max_participations: 1"
    config.write_text(config.read_text().replace("privacy: none", f"privacy: {{{private}}}"))
    return Clients(str(tmp_path / "material"), str(tmp_path))


def start_of(clients) -> np.ndarray:
    numbers = sum(parameter.numel() for parameter in clients.model.trained.values())
    return (0.3 * np.random.default_rng(5).standard_normal(numbers)).astype(np.float32)


def test_opacus_ghost_clipping_takes_the_step_that_ours_takes(clients, monkeypatch):
    from at_scale import ghost, stock_work

    from fedlora.values import Mechanism

    quiet = Mechanism(max_grad_norm=BOUND, noise_multiplier=1e-9)
    monkeypatch.setattr(stock_work.Clients, "_terms", lambda self, records: (sampling, quiet))
    sampling = stock_work.poisson(8, 8)
    built = ghost._model

    def with_our_a(config, classes):  # PEFT draws one of its own
        model = built(config, classes)
        with torch.no_grad():
            for site, (a, _) in clients.model.live.items():
                model.base_model.model.get_submodule(site).lora_A["default"].weight.copy_(a)
            model.load_state_dict(
                {
                    name: value
                    for name, value in clients.model.peft_model.state_dict().items()
                    if "pooler" in name
                },
                strict=False,
            )
        return model

    monkeypatch.setattr(ghost, "_model", with_our_a)
    start = start_of(clients)
    theirs, ours = clients.ghost(0, start), clients.step(0, 1, start)
    moved = np.linalg.norm(ours - start)
    # Rate times what is left of the mean where one class is clipped and the other, opposite, is not
    assert 0.001 * BOUND < moved < 0.1 * BOUND
    # Opacus clips by C / (norm + 1e-6); float32 steps of numbers near 1 are the rest
    assert np.linalg.norm(theirs - ours) <= 1e-3 * moved


def test_the_step_with_and_without_ledger_moves_as_much_and_only_one_pays(clients, tmp_path):
    start = start_of(clients)
    paid, unpaid = clients.train(0, 1, start), clients.step(1, 1, start)
    # The same clip and noise on two clients' records: norms of thousands of like draws are close.
    assert np.linalg.norm(paid - start) == pytest.approx(np.linalg.norm(unpaid - start), rel=0.2)
    assert [path.name for path in (tmp_path / "ledgers").iterdir()] == ["client-0.jsonl"]


@pytest.mark.parametrize("megabytes", [0.3, 3.0])
def test_an_update_has_the_bytes_that_the_case_names(tmp_path, megabytes):
    from at_scale.cases import Case
    from at_scale.material import make

    make(Case(name="one", megabytes=megabytes, clients=1, asked=1, rounds=1), tmp_path / "material")
    numbers = json.loads((tmp_path / "material" / "trained.json").read_text())
    assert 4 * numbers == pytest.approx(megabytes * 1e6, rel=0.01)


def test_time_in_steps_is_counted_once_and_only_within_the_round():
    from at_scale.cases import Case
    from at_scale.figures import measured

    case = Case(name="ten", clients=10, asked=10, rounds=2)
    spans = [
        [(8.0, 11.0), (10.5, 12.0), (13.0, 13.5)],
        [(14.0, 30.0)],
    ]  # of two actors; the round is 10 to 20
    row = {"began": 1.0, "stamps": [4.0, 10.0, 20.0], "spans": spans, "answered": [10, 9]}
    found = measured(row, case)
    assert found["round_s"] == [10.0]
    assert found["start_s"] == pytest.approx(-1.0)  # 9 s to the end of the first round, less one of 10 s
    assert found["incomplete"] == 1
    assert found["busy"] == pytest.approx((2.0 + 0.5 + 6.0) / 20)
    assert found["overhead_ms"] == pytest.approx(1e3 * (10.0 - 8.5 / 2) / 10)


def test_a_ratio_is_taken_within_a_repeat():
    from at_scale.figures import ratio

    rows = [
        {"case": "c", "arm": arm, "repeat": repeat, "round_s": [seconds]}
        for arm, times in (("fedlora", (1.0, 10.0, 1.0)), ("flower", (2.0, 30.0, 4.0)))
        for repeat, seconds in enumerate(times)
    ]
    assert ratio(rows, "c", "flower") == 3.0


def test_a_peer_that_is_not_done_gives_a_lower_bound_and_one_that_broke_none():
    from at_scale.figures import Goal, ratio

    ours = {"case": "c", "arm": "fedlora", "repeat": 0, "round_s": [1.0], "whole_s": 30.0}
    late = {"case": "c", "arm": "flower", "repeat": 0, "failed": "not done in 900 s", "whole_s": 900.0}
    assert ratio([ours, late], "c", "flower") == 30.0
    broken = ratio([ours, {**late, "whole_s": None}], "c", "flower")
    assert broken is not None and not Goal(name="", value=broken, goal=1.0).met
    assert ratio([ours], "c", "flower") is None
