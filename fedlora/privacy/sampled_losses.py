"""The law of what a Gaussian step on a Poisson sample may lose.

dp-accounting defines it, bounds it and makes a distribution of it, but finds the outcomes that belong to losses one by
one, in Python, which is most of its time. Here all are found at once, by the same formula.
"""

import math
from typing import Any

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray


def sampled_losses(sigma: float, rate: float, grid: float) -> PrivacyLossDistribution:
    """What dp-accounting's `from_gaussian_mechanism` makes of such a step: an upper bound, in both directions.

    Args:
        sigma: standard deviation of the noise on a sum that one record moves by 1 at most.
        rate: in (0, 1), at which each record is drawn.
        grid: distance of the losses that are told apart.

    Source: Doroshenko et al., "Connect the Dots", arXiv 2207.04380.
    """
    removed, added = (
        _pmf(GaussianPrivacyLoss(sigma, sampling_prob=rate, adjacency_type=direction), sigma, grid)
        for direction in (AdjacencyType.REMOVE, AdjacencyType.ADD)
    )
    return PrivacyLossDistribution(removed, added)


def _pmf(loss: GaussianPrivacyLoss, sigma: float, grid: float) -> pld_pmf.PLDPmf:
    bounds = loss.connect_dots_bounds()
    assert bounds.epsilon_lower is not None and bounds.epsilon_upper is not None  # of discrete noise only
    lower, upper = math.floor(bounds.epsilon_lower / grid), math.ceil(bounds.epsilon_upper / grid)
    deltas = _deltas(np.arange(lower, upper + 1) * grid, loss, sigma)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid, lower, upper, deltas)


def _deltas(epsilons: NDArray[Any], loss: GaussianPrivacyLoss, sigma: float) -> NDArray[Any]:
    """For each epsilon the least delta at which one step keeps it: `loss.get_delta_for_epsilon`."""
    removed, least = loss.adjacency_type is AdjacencyType.REMOVE, math.log1p(-loss.sampling_prob)
    sign = 1.0 if removed else -1.0
    inside = sign * epsilons > least
    deltas = np.zeros_like(epsilons)
    if removed:  # no outcome says more against a record that is drawn seldom: here all of them count
        deltas[~inside] = -np.expm1(epsilons[~inside])
    asked = epsilons[inside]
    # What one who is always drawn would lose there: log(1 + (exp(loss) - 1) / rate), without its digits' cancelling.
    whole = sign * asked - math.log(loss.sampling_prob) + np.log(-np.expm1(least - sign * asked))
    outcomes = (-0.5 if removed else 0.5) - sign * whole * sigma**2
    deltas[inside] = loss.mu_upper_cdf(outcomes) - np.exp(asked + loss.mu_lower_log_cdf(outcomes))
    return np.clip(deltas, 0, 1)
