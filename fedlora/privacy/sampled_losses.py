"""The law of what a Gaussian step on a Poisson sample may lose.

dp-accounting defines it, bounds it and makes a distribution of it, but finds the outcomes that belong to losses one by
one, in Python, which is most of its time. Here all are found at once, by the same formula.
"""

import math
from typing import Any

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray


def sampled_losses(
    sigma: float, rate: float, grid: float, relation: NeighboringRelation
) -> PrivacyLossDistribution:
    """What dp-accounting's `from_gaussian_mechanism` makes of such a step: an upper bound, in every direction.

    Args:
        sigma: standard deviation of the noise on a sum that one record moves by 1 at most.
        rate: in (0, 1), at which each record is drawn.
        grid: distance of the losses that are told apart.
        relation: of neighbours: a record is added or removed, or replaced by another.

    Source: Doroshenko et al., "Connect the Dots", arXiv 2207.04380.
    """
    replaced = relation is NeighboringRelation.REPLACE_ONE
    directions = (AdjacencyType.REPLACE,) if replaced else (AdjacencyType.REMOVE, AdjacencyType.ADD)
    losses = [GaussianPrivacyLoss(sigma, sampling_prob=rate, adjacency_type=each) for each in directions]
    return PrivacyLossDistribution(*(_pmf(loss, sigma, grid) for loss in losses))


def _pmf(loss: GaussianPrivacyLoss, sigma: float, grid: float) -> pld_pmf.PLDPmf:
    bounds = loss.connect_dots_bounds()
    assert bounds.epsilon_lower is not None and bounds.epsilon_upper is not None  # of discrete noise only
    lower, upper = math.floor(bounds.epsilon_lower / grid), math.ceil(bounds.epsilon_upper / grid)
    deltas = _deltas(np.arange(lower, upper + 1) * grid, loss, sigma)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid, lower, upper, deltas)


def _deltas(epsilons: NDArray[Any], loss: GaussianPrivacyLoss, sigma: float) -> NDArray[Any]:
    """For each epsilon the least delta at which one step keeps it: `loss.get_delta_for_epsilon`."""
    if loss.adjacency_type is AdjacencyType.REPLACE:
        return _beyond(epsilons, _of_replaced(epsilons, loss.sampling_prob, sigma), loss)
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
    deltas[inside] = _beyond(asked, outcomes, loss)
    return deltas


def _of_replaced(epsilons: NDArray[Any], rate: float, sigma: float) -> NDArray[Any]:
    """The outcome at which a record that is replaced loses each epsilon.

    It is sigma^2 (asinh(-alpha sinh(epsilon / 2)) - epsilon / 2) with alpha = exp(1 / (2 sigma^2)) (1 - rate) / rate,
    in logarithms, since alpha and the sinh may be beyond all numbers.
    """
    half = np.abs(epsilons) / 2
    with np.errstate(divide="ignore"):  # no loss at all: a sinh of 0, and the outcome in the middle
        sinh = half + np.log(-np.expm1(-2 * half)) - math.log(2)
    inner = 0.5 / sigma**2 + math.log1p(-rate) - math.log(rate) + sinh
    asinh = np.logaddexp(0.5 * np.logaddexp(0, 2 * inner), inner)
    return -np.sign(epsilons) * (asinh + half) * sigma**2


def _beyond(epsilons: NDArray[Any], outcomes: NDArray[Any], loss: GaussianPrivacyLoss) -> NDArray[Any]:
    """By how much the likelier neighbour's outcomes up to there exceed exp(epsilon) times the other's."""
    more = loss.mu_upper_cdf(outcomes) - np.exp(epsilons + loss.mu_lower_log_cdf(outcomes))
    return np.clip(more, 0, 1)
