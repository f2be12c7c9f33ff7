"""A round's line says how long each update that counted was, and how long the noise in it was expected to be."""

import json
import math
from dataclasses import replace

import pytest
import torch

from fedlora.algebra.deltas import joint_norm
from fedlora.algebra.diagnostics import signal_to_noise
from fedlora.federation.gather import gather
from fedlora.federation.lengths import lengths, noise_length
from fedlora.federation.loop import line_zero, rounds
from fedlora.federation.plan import plan
from fedlora.federation.remembered import Remembered
from fedlora.federation.store import Store
from fedlora.privacy.gaussian import noise_energy, released
from fedlora.privacy.noise import SeededNoise
from fedlora.runtime.simulate import simulate
from fedlora.values import DpEvent, Origin, Refusal, RefusalReason, Released
from tests.federation.answering import Answering

EVENT = DpEvent(noise_multiplier=1.5, sample_rate=0.1, steps=3, expected_batch=8.0, max_draw=32)
NUMBERS = 7 * 3 + 5 * 3 + 2 * 4
MARGIN = 1 + 2**-10
"""Noise is scaled to the clip and that; what rounding adds is a millionth."""


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def lines_of(lab, tmp_path, cohort, max_grad_norm, **federation):
    method = lab.method()
    state, store = lab.start(method), Store(tmp_path)
    store.begin(state, line_zero({}))
    return [
        line
        for _, line in rounds(
            state, origin=Origin(run="run", base_model="", code=""), seed=7, members=lab.members(4),
            method=method, federation=lab.federation(rounds=2, **federation), cohort=cohort, store=store,
            score=lambda adapters: {}, max_grad_norm=max_grad_norm,
        )
    ]  # fmt: skip


def test_a_private_runs_line_holds_lengths_that_equal_a_calculation_by_hand(lab, tmp_path):
    decaying = {"name": "sgd", "lr": 0.1, "decay": "linear"}
    first, second = lines_of(lab, tmp_path, Answering((EVENT,)), 2.0, optimizer=decaying)
    assert first["update_norm"] == dict.fromkeys(first["answered"], 6.0)  # 36 ones
    by_hand = 0.1 / 8 * 1.5 * 2.0 * MARGIN * math.sqrt(3 * NUMBERS)
    assert first["noise_norm"] == pytest.approx(dict.fromkeys(first["answered"], by_hand), rel=1e-5)
    assert second["noise_norm"] == pytest.approx(dict.fromkeys(second["answered"], by_hand / 2), rel=1e-5)
    kept = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line.get("noise_norm") for line in kept] == [None, first["noise_norm"], second["noise_norm"]]


@pytest.mark.parametrize(
    ("spent", "max_grad_norm", "optimizer"),
    [
        ((), None, {"name": "sgd", "lr": 0.1}),
        ((EVENT,), None, {"name": "sgd", "lr": 0.1}),
        ((EVENT,), 2.0, {"name": "adamw", "lr": 0.1}),
        ((EVENT,), 2.0, {"name": "sgd", "lr": 0.1, "precondition": "lora-pro"}),
        ((replace(EVENT, expected_batch=None, max_draw=None),), 2.0, {"name": "sgd", "lr": 0.1}),
    ],
    ids=["no privacy", "no known clip", "no sgd", "no plain sgd", "no known batch"],
)
def test_where_the_noise_is_not_known_only_lengths_are_told(lab, tmp_path, spent, max_grad_norm, optimizer):
    line = lines_of(lab, tmp_path, Answering(spent), max_grad_norm, optimizer=optimizer)[0]
    assert line["update_norm"] == dict.fromkeys(line["answered"], 6.0) and "noise_norm" not in line


def test_only_updates_that_count_are_measured_late_ones_with_the_rate_they_were_asked_for(lab, generator):
    method, federation = lab.method("ffa"), lab.federation(cohort=3)
    state = lab.start(method)
    early = plan(state, lab.members(4), run="run", federation=federation, seed=7)
    late = lab.update("client-3", early, lab.delta(state, generator))
    state = replace(state, round=1)
    planned = replace(early, round=2, cohort=("client-0", "client-1", "client-2"))
    counted = lab.update("client-1", planned, lab.delta(state, generator))
    rejected = lab.update("client-2", replace(planned, run="other"), lab.delta(state, generator))
    refused = Refusal(client="client-0", run="run", round=2, reason=RefusalReason.BUDGET)
    heard = gather(
        state, planned, [late, refused, rejected, counted],
        memory=Remembered(), method=method, federation=federation,
    ).report  # fmt: skip
    assert list(heard.released) == ["client-1", "client-3"]
    for update in (counted, late):
        found = heard.released[update.client]
        assert found.length == pytest.approx(joint_norm(update.delta), rel=1e-12)
        assert (found.round, found.numbers, found.spent) == (update.round, NUMBERS, update.spent[0])
    falling = lab.federation(rounds=2, optimizer={"name": "sgd", "lr": 0.1, "decay": "linear"})
    asked = Released(round=1, length=1.0, numbers=NUMBERS, spent=EVENT)
    of_first, of_second = (noise_length(replace(asked, round=number), falling, 2.0) for number in (1, 2))
    assert of_first == pytest.approx(2 * of_second)
    told = lengths({"a": asked, "b": replace(asked, spent=None)}, falling, 2.0)
    assert list(told["update_norm"]) == ["a", "b"] and list(told["noise_norm"]) == ["a"]


@pytest.mark.parametrize(("bound", "sigma"), [(1.0, 1.0), (2.0, 0.6), (1e-4, 13.0)])
def test_the_expected_energy_is_that_of_the_noise_that_is_added(bound, sigma):
    """Of 250,000 numbers, whose energy has a relative standard deviation of sqrt(2 / n) = 0.28 %: within five."""
    nothing = {"x": torch.zeros(200_000, dtype=torch.float64), "y": torch.zeros(50_000, dtype=torch.float64)}
    sums = released(
        nothing, bound=bound, noise_multiplier=sigma, noise=SeededNoise(3), purpose=("energy", str(bound))
    )
    energy = sum(float(total.square().sum()) for total in sums.values())
    assert energy == pytest.approx(noise_energy(bound, sigma, 250_000), rel=0.0142)


def test_where_noise_drowns_everything_real_updates_are_as_long_as_it(tiny_config, tmp_path):
    """Noise of hundreds of clips: the energy of 355 numbers has a relative deviation of 7.5 %; within four."""
    run = simulate(tiny_config(privacy__target_epsilon=0.02), tmp_path / "run", lambda event: None)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()][1:]
    ratios = [
        (line["update_norm"][client] / line["noise_norm"][client]) ** 2
        for line in lines
        for client in line["answered"]
    ]
    assert len(ratios) == 6 and all(abs(ratio - 1) < 0.3 for ratio in ratios)
    assert abs(sum(ratios) / 6 - 1) < 0.13
    assert signal_to_noise(sum(ratios), 6.0) < 0.13
