"""About what epsilon steps cost, by numpy alone: to be told, never to be used.

The accountants that a run trusts take seconds to load and to answer; these losses are added up in milliseconds.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.values import DpEvent

POINTS = 1 << 15
"""At which a sum of losses is told apart, over its whole width."""
WIDTH = 12.0
"""Standard deviations of noise, and of a sum, to either side; what lies beyond has a probability of 1e-32."""


def rough_epsilon(events: Sequence[DpEvent], delta: float, accountant: str) -> float:
    """As pld tells it, which is near prv; as rdp does where that is asked for, which is larger."""
    if not events:
        return 0.0
    if accountant == "rdp":
        from fedlora.privacy.accountants import whole_order_epsilon

        return whole_order_epsilon(events, delta)  # the run asks Opacus, which would load torch
    return max(
        _least_epsilon([_losses(event, removed) for event in events], delta) for removed in (True, False)
    )


_Steps: TypeAlias = tuple[NDArray[Any], NDArray[Any], int]
"""Privacy losses of one step, the probability of each, and how many such steps there are."""


def _losses(event: DpEvent, removed: bool) -> _Steps:
    """Of a Gaussian on a Poisson sample, at many of the numbers that it may say with and without a record.

    removed: of a record that is taken away; else of one that comes.  Source: Koskela et al., arXiv 1906.03049.
    """
    sigma, rate = event.noise_multiplier, event.sample_rate
    said = np.linspace(-WIDTH * sigma, 1 + WIDTH * sigma, POINTS)
    ratio = (said - 0.5) / sigma**2  # in logarithms, as the density is
    if rate < 1:
        ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + ratio)
    seen = np.exp((ratio if removed else 0) - (said / sigma) ** 2 / 2)
    return (ratio if removed else -ratio), seen / seen.sum(), event.steps


def _least_epsilon(found: Sequence[_Steps], delta: float) -> float:
    """At which what all steps together lose beyond it comes to delta at most."""
    loss, law = _summed(found, delta)
    loss, law = loss[loss > 0], law[loss > 0]
    if not len(loss):
        return 0.0
    beyond = np.cumsum(law[::-1])[::-1]
    pardoned = np.cumsum((law * np.exp(loss[0] - loss))[::-1])[::-1] * np.exp(np.minimum(loss - loss[0], 700))
    enough = np.flatnonzero(beyond - pardoned <= delta)
    return float(loss[enough[0]]) if len(enough) else math.inf


def _summed(found: Sequence[_Steps], delta: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Losses of all steps together, upwards, and the probability of each: Fourier transforms multiply."""
    mean = spread = furthest = 0.0
    for loss, chance, steps in found:
        own = float(chance @ loss)
        mean += steps * own
        spread += steps * float(chance @ (loss - own) ** 2)
        # Three great losses may meet where there are so many steps; more of them are part of the spread.
        furthest = max(furthest, min(steps, 3) * float(np.ptp(loss[chance > delta / (1e6 * steps)])))
    width = 2 * (WIDTH * math.sqrt(spread) + furthest)
    transform = np.ones(POINTS // 2 + 1, dtype=np.complex128)
    for loss, chance, steps in found:
        transform *= np.fft.rfft(_on_a_circle(loss * (POINTS / width), chance)) ** steps
    law = np.maximum(np.fft.irfft(transform, POINTS), 0)
    # The circle tells a sum up to whole widths, and nearly all of its law lies within half of one from the mean.
    loss = np.arange(POINTS) * (width / POINTS)
    loss += width * np.round((mean - loss) / width)
    upwards = np.argsort(loss)
    return loss[upwards], law[upwards]


def _on_a_circle(places: NDArray[Any], chance: NDArray[Any]) -> NDArray[Any]:
    """POINTS probabilities: each place's is divided between its two neighbours, which keeps the mean."""
    below = np.floor(places)
    share, first = places - below, below.astype(np.int64)
    law = np.zeros(POINTS)
    law += np.bincount(first % POINTS, chance * (1 - share), POINTS)
    law += np.bincount((first + 1) % POINTS, chance * share, POINTS)
    return law
