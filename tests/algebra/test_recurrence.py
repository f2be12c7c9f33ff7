"""What comes back of remembered updates: the two sums against plain regressions, and against a known noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.algebra.flat import Layout
from fedlora.algebra.recurrence import RunningRecurrence
from fedlora.values import FRAME, Delta, Recurrence


def delta(row):
    return Delta(basis=FRAME, sites={"x": row[:4].view(2, 2)}, head={"bias": row[4:]})


def sums(pairs, weights, *, centred):
    running = RunningRecurrence(Layout.of(delta(pairs[0][0])), centred=centred)
    for (fresh, stale), weight in zip(pairs, weights, strict=True):
        running.add(delta(fresh), None if stale is None else delta(stale), weight)
    return running.sums()


@st.composite
def rounds(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = draw(st.integers(2, 6))
    fresh, stale = torch.randn(2, count, 6, generator=generator, dtype=torch.float64)
    weights = [draw(st.floats(0.1, 5.0)) for _ in range(count)]
    return fresh, stale, torch.tensor(weights, dtype=torch.float64)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(rounds(), st.booleans())
def test_their_ratio_is_the_least_squares_slope(case, centred):
    fresh, stale, weights = case
    found = sums(list(zip(fresh, stale, strict=True)), weights.tolist(), centred=centred)
    root = weights.sqrt().unsqueeze(1)
    # One unknown slope, and an intercept for each of the six numbers where the line need not pass through zero.
    columns = [(root * stale).flatten()]
    if centred:
        columns += [(root * torch.eye(6, dtype=torch.float64)[n]).flatten() for n in range(6)]
    fit = torch.linalg.lstsq(torch.stack(columns, 1), (root * fresh).flatten().unsqueeze(1))
    assert found.product / found.energy == pytest.approx(float(fit.solution[0]), rel=1e-9, abs=1e-9)


def test_a_client_heard_for_the_first_time_is_a_point_at_zero():
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    stale = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    stale[1] = 0
    silent = [(fresh[0], stale[0]), (fresh[1], None), (fresh[2], stale[2])]
    for centred in (True, False):
        zero = sums(list(zip(fresh, stale, strict=True)), [1.0, 2.0, 3.0], centred=centred)
        assert sums(silent, [1.0, 2.0, 3.0], centred=centred) == zero


@pytest.mark.parametrize("centred", [True, False])
def test_pairs_that_say_nothing_say_zero(centred):
    row = torch.arange(1.0, 7.0)
    nothing = [[(row, None)], [(row, None), (2 * row, None)]]
    if centred:  # one point, or points above each other, have no slope
        nothing += [[(row, row / 3)], [(row, row / 3), (2 * row, row / 3), (5 * row, row / 3)]]
    for pairs in nothing:
        assert sums(pairs, [0.3] * len(pairs), centred=centred) == Recurrence()


@pytest.mark.parametrize(("snr", "common"), [(0.1, 0.0), (1.0, 0.0), (10.0, 0.0), (1.0, 30.0)])
def test_the_noise_that_is_released_is_in_the_denominator_once(snr, common):
    """A signal at rest under fresh noise of energy v: SNR / (1 + SNR), of deviations where all have much in common."""
    clients, numbers = 40, 2_500
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    signal = math.sqrt(snr) * normal(clients, numbers)
    shift = common * normal(numbers)
    old, new = (signal + shift + normal(clients, numbers) for _ in range(2))
    running = {
        centred: RunningRecurrence(
            Layout.of(Delta(basis=FRAME, sites={"x": old[0].view(50, 50)})), centred=centred
        )
        for centred in (True, False)
    }
    for fresh, stale in zip(new, old, strict=True):
        for one in running.values():
            one.add(*(Delta(basis=FRAME, sites={"x": row.view(50, 50)}) for row in (fresh, stale)), 1.0)
    found = {centred: one.sums() for centred, one in running.items()}
    beta = found[True].product / found[True].energy
    # 100,000 products: three standard errors of the slope are below 3 / sqrt(100,000) = 0.01.
    assert beta == pytest.approx(snr / (1 + snr), abs=0.01)
    through_zero = found[False].product / found[False].energy
    if (
        common
    ):  # the breaks: a line through zero sees the common part alone; without v it is 1, whatever the noise
        assert through_zero > 0.99
    else:
        assert through_zero == pytest.approx(beta, abs=0.01)
        assert found[False].product / (found[False].energy - clients * numbers) == pytest.approx(1, abs=0.2)


def test_no_bit_depends_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(4)
    fresh, stale = torch.randn(2, 300_001, generator=generator)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            running = RunningRecurrence(
                Layout.of(Delta(basis=FRAME, sites={}, head={"bias": fresh})), centred=True
            )
            running.add(*(Delta(basis=FRAME, sites={}, head={"bias": row}) for row in (fresh, stale)), 0.7)
            running.add(*(Delta(basis=FRAME, sites={}, head={"bias": row}) for row in (stale, fresh)), 0.2)
            found.append(running.sums())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert found[0].energy > 0
