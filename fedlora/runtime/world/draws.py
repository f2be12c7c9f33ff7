"""Single numbers from a seed and a purpose, by inversion: no generator, so no state and no order of drawing."""

import math

from scipy.special import betaincinv, ndtri

from fedlora.seeds import key_for


def uniform(seed: int, *purpose: str | int) -> float:
    """In (0, 1), both ends excluded, with 53 bits."""
    return ((int.from_bytes(key_for(seed, *purpose)[:8], "little") >> 11) + 0.5) / (1 << 53)


def lognormal(sigma: float, seed: int, *purpose: str | int) -> float:
    """Median 1; the logarithm has the standard deviation `sigma`."""
    return math.exp(sigma * float(ndtri(uniform(seed, *purpose)))) if sigma > 0 else 1.0


def exponential(mean: float, seed: int, *purpose: str | int) -> float:
    """Positive."""
    return -mean * math.log(uniform(seed, *purpose))


def beta(a: float, b: float, seed: int, *purpose: str | int) -> float:
    """In [0, 1], from Beta(a, b)."""
    return float(betaincinv(a, b, uniform(seed, *purpose)))


def group_of(groups: int, seed: int, client: str) -> int:
    """Which of `groups` a client is in, each equally likely."""
    return int(uniform(seed, "world", "group", client) * groups)
