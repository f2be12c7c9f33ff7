"""About how much noise a budget takes, by numpy alone: to be told, never to be used.

The accountants that a run trusts take seconds to load and to answer; `fedlora check` is to answer before that. What is
told is rather too much than too little.
"""

import math
from itertools import pairwise

from fedlora.config.schema import Privacy, RunConfig
from fedlora.errors import PrivacyError
from fedlora.runtime.check.rough_epsilon import rough_epsilon
from fedlora.values import DpEvent

NOISE = (1e-2, 1e4)
"""Between which noise is looked for, as in a run."""


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

    beside = _beside(privacy)
    if (others := rough_epsilon(beside, privacy.target_delta, privacy.accountant)) >= privacy.target_epsilon:
        raise PrivacyError(
            f"privacy.evaluation_noise {privacy.evaluation_noise}: the scores of {privacy.max_participations} "
            f"participations cost epsilon {others:.4g}, all of target_epsilon {privacy.target_epsilon}; raise one"
        )

    def within(sigma: float) -> bool:
        events = [DpEvent(noise_multiplier=sigma, sample_rate=rate, steps=steps), *beside]
        return rough_epsilon(events, privacy.target_delta, privacy.accountant) <= privacy.target_epsilon

    low = high = 1.0
    while not within(high):
        low, high = high, 2 * high
        if high > NOISE[1]:
            raise PrivacyError(
                f"no noise keeps privacy.target_epsilon {privacy.target_epsilon} over {steps} steps at rate {rate:g}; "
                "raise it, or lower privacy.max_participations, federation.local_steps or federation.batch_size"
            )
    while low == high and high > NOISE[0]:
        low = high / 2
        if within(low):
            high = low
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if within(middle) else (middle, high)
    return _rounded_up(max(high, NOISE[0]))


def _beside(privacy: Privacy) -> list[DpEvent]:
    """Scores that are told with noise: without sampling, as `spent_on_mean` says, which would load torch."""
    if privacy.evaluation_noise is None:
        return []
    told = min(max(privacy.evaluation_noise, NOISE[0] / 10), NOISE[1])
    return [DpEvent(noise_multiplier=told, sample_rate=1.0, steps=privacy.max_participations)]


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
