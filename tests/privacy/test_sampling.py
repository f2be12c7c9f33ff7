"""The draws are Poisson: each record on its own, whatever the others do. Counterfeits of it fail."""

import math

import pytest
import torch

from fedlora.privacy.noise import OsEntropyNoise, SeededNoise
from fedlora.privacy.sampling import poisson, poisson_draw
from fedlora.values import Sampling

RECORDS, RATE, STEPS = 2000, 0.05, 400


def at(rate, records=RECORDS):
    return Sampling(rate=rate, expected_batch=max(1.0, rate * records), max_draw=records + 1)


SAMPLING = at(RATE)


def draws(source, draw=poisson_draw):
    """Which record took part in which step, (steps, records)."""
    taken = torch.zeros(STEPS, RECORDS, dtype=torch.float64)
    for step in range(STEPS):
        taken[step, draw(RECORDS, SAMPLING, source, ("draw", step))] = 1
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


def fixed_size(records, sampling, source, purpose):
    return source.uniform(records, purpose=purpose).argsort()[: round(records * sampling.rate)]


def shuffled(records, sampling, source, purpose):
    per_epoch = round(1 / sampling.rate)
    order = source.uniform(records, purpose=("epoch", purpose[-1] // per_epoch)).argsort()
    return order.chunk(per_epoch)[purpose[-1] % per_epoch]


def a_twentieth_too_often(records, sampling, source, purpose):
    return poisson_draw(records, at(sampling.rate * 1.05), source, purpose)


def same_draw_again(records, sampling, source, purpose):
    return poisson_draw(records, sampling, source, (purpose[0], purpose[1] // 2))


def records_in_pairs(records, sampling, source, purpose):
    half = poisson_draw(records // 2, sampling, source, purpose)
    return torch.cat([half, half + records // 2])


@pytest.mark.parametrize(
    "counterfeit", [fixed_size, shuffled, a_twentieth_too_often, same_draw_again, records_in_pairs]
)
def test_counterfeits_are_told_apart(counterfeit):
    assert not is_poisson(draws(SeededNoise(5), counterfeit))


def test_indices_are_sorted_unique_and_in_range():
    drawn = poisson_draw(1000, at(0.5), SeededNoise(1), ("x",))
    assert torch.equal(drawn, drawn.unique()) and drawn.dtype == torch.int64
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 1000


def test_empty_draws_come_as_often_as_they_should():
    source, trials = SeededNoise(2), 4000
    empty = sum(len(poisson_draw(20, at(0.05), source, (t,))) == 0 for t in range(trials)) / trials
    p = 0.95**20
    assert abs(empty - p) < 4.5 * math.sqrt(p * (1 - p) / trials)
    assert len(poisson_draw(0, at(0.5), source, ("none",))) == 0


def test_limits_of_the_rate():
    assert torch.equal(poisson_draw(50, at(1.0), SeededNoise(1), ("all",)), torch.arange(50))
    for rate in (0.0, 1.01, math.nan):
        with pytest.raises(ValueError, match="rate"):
            Sampling(rate=rate, expected_batch=1.0, max_draw=10)
    with pytest.raises(ValueError, match="-1 records"):
        poisson_draw(-1, at(0.5), SeededNoise(1), ("x",))


@pytest.mark.parametrize("records", [63, 64, 65, 127, 128, 129, 9_983, 9_984, 10_000])
def test_a_record_more_or_less_moves_the_rate_by_no_rounding(records):
    """The rate is b / n of the declared n, unrounded; divisor and cap do not know n at all."""
    sampling = poisson(64, records)
    assert sampling == Sampling(rate=min(1.0, 64 / records), expected_batch=64.0, max_draw=64 + 112 + 40)


def test_the_cap_cuts_what_is_above_it_and_nothing_else():
    wide, tight = at(0.5, 400), Sampling(rate=0.5, expected_batch=200.0, max_draw=205)
    for step in range(50):
        whole, cut = (poisson_draw(400, s, SeededNoise(6), ("draw", step)) for s in (wide, tight))
        assert torch.equal(cut, whole[:205])


def test_a_cap_of_the_configuration_is_never_met():
    sampling, source = poisson(64, 2000), SeededNoise(8)
    assert max(len(poisson_draw(2000, sampling, source, (t,))) for t in range(3000)) < sampling.max_draw / 1.5


def test_two_clients_of_one_configuration_draw_different_records():
    """No seed is shared: joint inclusion is q^2, within five standard deviations, and no draw is repeated."""
    one, other = (draws(OsEntropyNoise()) for _ in range(2))
    q = RATE * RATE
    assert abs(float((one * other).mean()) - q) < 5 * math.sqrt(q * (1 - q) / one.numel())
