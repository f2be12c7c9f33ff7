"""What an owner tells of the model's accuracy: unbiased, noised, paid for, and only if the owner wants it."""

import math

import pytest
import torch

from fedlora.privacy import evaluation
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.evaluation import private_mean, spent_on_mean
from fedlora.privacy.gaussian import grid
from fedlora.privacy.noise import OsEntropyNoise, SeededNoise
from fedlora.values import DpEvent

RECORDS = 10_000
TRAINING = DpEvent(noise_multiplier=1.0, sample_rate=64 / RECORDS, steps=1000)


def told(values, noise=50.0, records=RECORDS, source=None, purpose=("accuracy", 1)):
    return private_mean(values, records, noise, noise=source or SeededNoise(5), purpose=purpose)


@pytest.mark.parametrize(("noise", "price"), [(100.0, 1.134), (50.0, 1.152), (20.0, 1.275), (10.0, 1.670)])
def test_ten_accuracies_cost_what_the_reference_table_says(noise, price):
    alone = epsilon([TRAINING], 1e-5)
    assert alone == pytest.approx(1.128, abs=2e-3)
    spent = epsilon([TRAINING, *[spent_on_mean(noise)] * 10], 1e-5)
    assert spent == pytest.approx(price, abs=2e-3)


def test_it_is_the_mean_on_average_and_its_noise_is_the_one_that_is_paid_for():
    right = torch.cat([torch.ones(7300), torch.zeros(2700)])
    answers = torch.tensor([told(right, purpose=("accuracy", number)) for number in range(4000)])
    deviation = 50.0 / RECORDS
    assert answers.mean().item() == pytest.approx(0.73, abs=4 * deviation / math.sqrt(4000))
    assert answers.std().item() == pytest.approx(deviation, rel=0.05)  # 4.5 deviations of a std of 4000
    assert spent_on_mean(50.0) == DpEvent(noise_multiplier=50.0, sample_rate=1.0, steps=1)


def test_one_record_moves_it_by_one_at_most_whatever_it_holds():
    quiet = torch.full((100,), 0.5)
    for wild in (1e9, -1e9, float("inf"), float("-inf"), float("nan")):
        moved = quiet.clone()
        moved[3] = wild
        assert abs(told(moved, records=100) - told(quiet, records=100)) <= 1.0 / 100 + 1e-9


def test_the_divisor_is_the_declared_number_and_not_how_many_there_are():
    answers = [
        told(torch.ones(80), records=100, purpose=("accuracy", number), noise=0.01) for number in range(200)
    ]
    assert sum(answers) / len(answers) == pytest.approx(0.8, abs=1e-3)


def test_the_exact_sum_never_leaves(monkeypatch):
    right = torch.ones(64)
    found = [told(right, records=64, noise=2.0, source=OsEntropyNoise()) for _ in range(50)]
    assert len(set(found)) > 40
    step = grid(1.0, 2.0)
    assert all((value * 64 / step).is_integer() for value in found)  # what `released` gives, and nothing else
    monkeypatch.setattr(
        evaluation, "released", lambda sums, **how: {name: total * 0 for name, total in sums.items()}
    )
    assert told(right) == 0.0
