"""The Gaussian mechanism on a grid: every number that is released is a multiple of one power of two.

Floating point betrays naive noise: from the sum x only some floats can come out, from its neighbour others.
Here the sum is rounded to a grid and the noise is rounded to the same grid, so what is released is
round(sum + noise): a function of the ideal mechanism's output alone. Rounding the sum can move it by half a step
in each of d coordinates, so neighbours differ by at most C + grid * sqrt(d), a small margin added, and that is
what the noise is scaled to: 0.2 % more of it at d = 1e6.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.privacy.noise import NoiseSource

GRID_BITS = 20
"""The grid is that many powers of two finer than the noise."""
MARGIN = 2.0**-10
"""What the sum may move by beyond its bound, in bounds: a batched float32 kernel rounds the gradients of other records
differently when one of them leaves. Measured: 1.4e-6 bounds at most (tests/privacy/test_neighbours.py)."""


def released(
    sums: Mapping[str, Tensor],
    *,
    bound: float,
    noise_multiplier: float,
    noise: NoiseSource,
    purpose: tuple[str | int, ...],
) -> dict[str, Tensor]:
    """The sums and their noise, float64, each an exact multiple of `grid(bound, noise_multiplier)`.

    Args:
        sums: float64, of any shapes; together one query.
        bound: what one record can move them by, in joint L2 norm.
        noise_multiplier: std of the noise in units of `sensitivity`; what the accountant is told.
        noise: its stream is (purpose, name of the sum).
        purpose: no two releases may share it.
    """
    step = grid(bound, noise_multiplier)
    numbers = sum(total.numel() for total in sums.values())
    deviation = noise_multiplier * sensitivity(bound, noise_multiplier, numbers)
    return {
        name: _rounded(total, step) + _noise_like(total, deviation, step, noise, (*purpose, name))
        for name, total in sums.items()
    }


def grid(bound: float, noise_multiplier: float) -> float:
    """The power of two, about a millionth of the noise, that every released number is a multiple of."""
    return 2.0 ** (math.floor(math.log2(noise_multiplier * bound)) - GRID_BITS)


def sensitivity(bound: float, noise_multiplier: float, numbers: int) -> float:
    """What one record can move `numbers` rounded sums by: the bound, and what rounding adds to it on both sides."""
    return bound * (1 + MARGIN) + grid(bound, noise_multiplier) * math.sqrt(numbers)


def noise_energy(bound: float, noise_multiplier: float, numbers: int) -> float:
    """The expected squared length of what `released` adds to `numbers` numbers in one release, rounding left aside."""
    return numbers * (noise_multiplier * sensitivity(bound, noise_multiplier, numbers)) ** 2


def _noise_like(
    total: Tensor, deviation: float, step: float, noise: NoiseSource, purpose: tuple[str | int, ...]
) -> Tensor:
    draw = noise.normal(tuple(total.shape), dtype=torch.float64, purpose=purpose)
    return _rounded(deviation * draw, step).to(total.device)


def _rounded(value: Tensor, step: float) -> Tensor:
    return torch.round(value.to(torch.float64) / step) * step
