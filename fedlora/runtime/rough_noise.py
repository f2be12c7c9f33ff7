"""About how much noise a budget takes, in a tenth of a second and without torch: to be told, never to be used.

What is told is rather too much than too little.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

from scipy.optimize import brentq

from fedlora.config.schema import Privacy, RunConfig
from fedlora.errors import PrivacyError
from fedlora.privacy.accountants import coarse_epsilon, whole_order_epsilon
from fedlora.values import DpEvent

COARSENESS = 5.0
"""Of the accountant's grid: a percent more epsilon than there is, thirty times as fast."""
NOISE = (1e-2, 1e4)
"""Between which noise is looked for, as in a run."""
MANY_STEPS = 100_000
"""Are composed by pld in seconds."""
TOLERANCE = 0.01
"""Of the noise, as a share of it."""
TINY = 1e-9
"""Epsilons below this, and above its inverse, are not told apart."""


def rough_noise(config: RunConfig, privacy: Privacy, records: int) -> float:
    """About the least noise multiplier at which a client of so many records stays within its budget.

    Raises:
        PrivacyError: delta is too large for the records, or no noise meets the budget.
    """
    if privacy.target_delta >= 1 / records:
        raise PrivacyError(
            f"privacy.target_delta {privacy.target_delta} is not below 1 / {records}, the records of a client; lower it"
        )
    rate = min(1.0, config.federation.batch_size / records)
    steps = privacy.max_participations * config.federation.local_steps

    told = privacy.evaluation_noise  # without sampling, as `spent_on_mean` says, which would load torch
    times = privacy.max_participations
    beside = [] if told is None else [DpEvent(noise_multiplier=told, sample_rate=1.0, steps=times)]

    def spent(sigma: float) -> float:
        events = [DpEvent(noise_multiplier=sigma, sample_rate=rate, steps=steps), *beside]
        return _epsilon(events, privacy.target_delta, privacy.accountant)

    try:
        return _rounded_up(_least_noise(spent, privacy.target_epsilon))
    except PrivacyError as error:
        raise PrivacyError(
            f"no noise keeps privacy.target_epsilon {privacy.target_epsilon} over {steps} steps at rate {rate:g}; "
            "raise it, or lower privacy.max_participations, federation.local_steps or federation.batch_size"
        ) from error


def _least_noise(spent: Callable[[float], float], target: float) -> float:
    """The least noise, to a percent, that spends no more than `target`; spending falls with noise."""

    @cache
    def excess(log_sigma: float) -> float:
        # In logarithms epsilon is nearly a line: three or four questions find where it crosses the target.
        return math.log(min(max(spent(math.exp(log_sigma)), TINY), 1 / TINY) / target)

    low = high = 0.0
    while excess(high) > 0:
        if math.exp(high) > NOISE[1]:
            raise PrivacyError(f"epsilon {spent(math.exp(high)):.4g} is spent at noise {math.exp(high):.4g}")
        low, high = high, high + math.log(2)
    while excess(low) <= 0:
        if math.exp(low) < NOISE[0]:
            return NOISE[0]
        low, high = low - math.log(2), low
    return math.exp(brentq(excess, low, high, xtol=TOLERANCE / 2) + TOLERANCE / 2)


def _epsilon(events: Sequence[DpEvent], delta: float, accountant: str) -> float:
    """By pld, which is near prv; by rdp, whose epsilon is larger, where that is asked for or pld would take seconds."""
    if accountant == "rdp" or sum(event.steps for event in events) > MANY_STEPS:
        return whole_order_epsilon(events, delta)  # the run asks Opacus, which would load torch
    return coarse_epsilon(events, delta, "pld", COARSENESS)


def _rounded_up(sigma: float) -> float:
    """sigma to two digits, upwards."""
    unit = 10.0 ** (math.floor(math.log10(sigma)) - 1)
    return float(f"{math.ceil(sigma / unit - 1e-9) * unit:.2g}")


def between(noise: list[tuple[float, float]], rate: float) -> float:
    """The noise at a rate between those of the smallest and the largest client, a line in logarithms."""
    ordered = sorted(noise)
    for (left, low), (right, high) in pairwise(ordered):
        if left <= rate <= right and left < right:
            share = math.log(rate / left) / math.log(right / left)
            return _rounded_up(low * (high / low) ** share)
    return ordered[0][1]
