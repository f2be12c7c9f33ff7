"""What is released lies on a grid that tells nothing about the sum, and carries the noise that it was charged for."""

import math

import pytest
import torch

from fedlora.privacy.gaussian import grid, released, sensitivity
from fedlora.privacy.noise import OsEntropyNoise, SeededNoise

SOURCES = [SeededNoise(3), OsEntropyNoise()]
SETTINGS = [(1.0, 1.0), (2.0, 0.6), (0.37, 13.0), (1e-4, 0.9), (5e3, 250.0)]
settings = pytest.mark.parametrize(("bound", "sigma"), SETTINGS)


def of(total, bound, sigma, noise=SOURCES[0], purpose=("x",)):
    return released({"x": total}, bound=bound, noise_multiplier=sigma, noise=noise, purpose=purpose)["x"]


@settings
def test_the_grid_is_a_power_of_two_a_millionth_of_the_noise(bound, sigma):
    assert math.frexp(grid(bound, sigma))[0] == 0.5
    assert 2**20 <= sigma * bound / grid(bound, sigma) < 2**21
    assert sensitivity(bound, sigma, 0) == bound * (1 + 2**-10)
    assert sensitivity(bound, sigma, 10**6) == pytest.approx(
        bound * (1 + 2**-10 + 1e-3 * sigma), rel=1e-3 * sigma
    )


@settings
@pytest.mark.parametrize("noise", SOURCES, ids=lambda source: source.kind)
def test_every_number_is_a_whole_multiple_of_the_grid_and_survives_float32(bound, sigma, noise):
    draw = torch.Generator().manual_seed(2)
    total = (
        3
        * bound
        * torch.nn.functional.normalize(torch.randn(100_000, generator=draw, dtype=torch.float64), dim=0)
    )
    out = of(total, bound, sigma, noise)
    whole = out / grid(bound, sigma)
    assert torch.equal(whole, whole.round()) and float(whole.abs().max()) < 2**24
    assert torch.equal(out.float().double(), out)


@settings
def test_neighbouring_sums_have_the_same_support(bound, sigma):
    """The low bits of what comes out say nothing about what went in: zero against a sum no float32 can hold."""
    step, count = grid(bound, sigma), 200_000
    for total in (0.0, bound / 3, -bound * math.pi / 4, 1e-9 * bound):
        out = of(torch.full((count,), total, dtype=torch.float64), bound, sigma, purpose=("x", str(total)))
        low = torch.bincount((out / step).long() % 16, minlength=16).double()
        chi_square = float(((low - count / 16) ** 2 / (count / 16)).sum())
        assert chi_square < 15 + 5 * math.sqrt(30), total


def test_without_the_grid_the_sum_shows_in_the_low_bits():
    """The attack that the grid stops: from x + noise, x modulo the spacing of the floats can be read off."""
    step = grid(1.0, 1.0)
    noise = of(torch.zeros(1000, dtype=torch.float64), 1.0, 1.0)
    naive = noise + 1 / 3
    assert float(((naive / step) - (naive / step).round()).abs().min()) > 0.01


@settings
@pytest.mark.parametrize("noise", SOURCES, ids=lambda source: source.kind)
def test_the_noise_has_the_multiplier_that_is_accounted_times_what_one_record_can_move(bound, sigma, noise):
    """Variance over two tensors of 1e6 each and in each of them: seven standard deviations wide."""
    shapes = {"a": (1000, 1000), "b": (10**6,)}
    out = released(
        {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()},
        bound=bound, noise_multiplier=sigma, noise=noise, purpose=("x",),
    )  # fmt: skip
    owed = sigma * (bound * (1 + 2**-10) + grid(bound, sigma) * math.sqrt(2e6))
    for value in out.values():
        assert abs(float(value.square().mean()) / owed**2 - 1) < 0.01


@settings
def test_rounded_neighbours_differ_by_no_more_than_is_paid_for(bound, sigma):
    """Sums that differ by C exactly, in 1000 random directions, rounded: never beyond C + grid sqrt d."""

    class Silent:
        def normal(self, shape, *, dtype, purpose):
            return torch.zeros(shape, dtype=dtype)

    draw, worst = torch.Generator().manual_seed(3), 0.0
    for _ in range(1000):
        one = torch.randn(500, generator=draw, dtype=torch.float64)
        move = bound * torch.nn.functional.normalize(
            torch.randn(500, generator=draw, dtype=torch.float64), dim=0
        )
        difference = of(one + move, bound, sigma, Silent()) - of(one, bound, sigma, Silent())
        worst = max(worst, float(difference.norm()))
    assert worst <= sensitivity(bound, sigma, 500)


def test_gradients_of_any_type_and_place_come_out_in_float64():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert of(torch.ones(3, dtype=dtype), 1.0, 1.0).dtype == torch.float64
    assert of(torch.zeros(()), 1.0, 1.0).shape == () and of(torch.zeros(0, 3), 1.0, 1.0).shape == (0, 3)
