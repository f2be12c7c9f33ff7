"""The draws are Poisson: each record on its own, whatever the others do. Counterfeits of it fail."""

import math

import pytest
import torch

from fedlora.privacy.noise import OsEntropyNoise, SeededNoise
from fedlora.privacy.sampling import poisson_draw

RECORDS, RATE, STEPS = 2000, 0.05, 400


def draws(source, draw=poisson_draw):
    """Which record took part in which step, (steps, records)."""
    taken = torch.zeros(STEPS, RECORDS, dtype=torch.float64)
    for step in range(STEPS):
        taken[step, draw(RECORDS, RATE, source, ("draw", step))] = 1
    return taken


def deviations(taken):
    """Standard scores of inclusion rate, spread of batch size, spread of a record's count, repetition."""
    cells, q = RECORDS * STEPS, RATE
    size, count = taken.sum(dim=1), taken.sum(dim=0)
    repeated = float((taken[1:] * taken[:-1]).mean())
    return {
        "rate": (float(taken.mean()) - q) / math.sqrt(q * (1 - q) / cells),
        "batch size": (float(size.var()) / (RECORDS * q * (1 - q)) - 1) / math.sqrt(2 / STEPS),
        "participation": (float(count.var()) / (STEPS * q * (1 - q)) - 1) / math.sqrt(2 / RECORDS),
        "repetition": (repeated - q * q) / math.sqrt(q * q * (1 - q * q) / cells),
    }


def is_poisson(taken):
    return all(abs(z) < 5.5 for z in deviations(taken).values())


@pytest.mark.parametrize("source", [SeededNoise(5), OsEntropyNoise()], ids=lambda source: source.kind)
def test_draws_are_poisson(source):
    assert is_poisson(draws(source)), deviations(draws(source))


def fixed_size(records, rate, source, purpose):
    return source.uniform(records, purpose=purpose).argsort()[: round(records * rate)]


def shuffled(records, rate, source, purpose):
    per_epoch = round(1 / rate)
    order = source.uniform(records, purpose=("epoch", purpose[-1] // per_epoch)).argsort()
    return order.chunk(per_epoch)[purpose[-1] % per_epoch]


def a_twentieth_too_often(records, rate, source, purpose):
    return poisson_draw(records, rate * 1.05, source, purpose)


def same_draw_again(records, rate, source, purpose):
    return poisson_draw(records, rate, source, (purpose[0], purpose[1] // 2))


def records_in_pairs(records, rate, source, purpose):
    half = poisson_draw(records // 2, rate, source, purpose)
    return torch.cat([half, half + records // 2])


@pytest.mark.parametrize(
    "counterfeit", [fixed_size, shuffled, a_twentieth_too_often, same_draw_again, records_in_pairs]
)
def test_counterfeits_are_told_apart(counterfeit):
    assert not is_poisson(draws(SeededNoise(5), counterfeit))


def test_indices_are_sorted_unique_and_in_range():
    drawn = poisson_draw(1000, 0.5, SeededNoise(1), ("x",))
    assert torch.equal(drawn, drawn.unique()) and drawn.dtype == torch.int64
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 1000


def test_empty_draws_come_as_often_as_they_should():
    source, trials = SeededNoise(2), 4000
    empty = sum(len(poisson_draw(20, 0.05, source, (t,))) == 0 for t in range(trials)) / trials
    p = 0.95**20
    assert abs(empty - p) < 4.5 * math.sqrt(p * (1 - p) / trials)
    assert len(poisson_draw(0, 0.5, source, ("none",))) == 0


def test_limits_of_the_rate():
    assert torch.equal(poisson_draw(50, 1.0, SeededNoise(1), ("all",)), torch.arange(50))
    for records, rate in ((5, 0.0), (5, 1.01), (5, float("nan")), (-1, 0.5)):
        with pytest.raises(ValueError, match="rate"):
            poisson_draw(records, rate, SeededNoise(1), ("x",))
