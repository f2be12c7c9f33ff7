"""Means over seeds, and how sure they are; pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and the interval around it; None where fewer than two values leave nothing to tell it from."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def excludes_zero(self) -> bool:
        """Whether all of an interval lies on one side of zero.

        Not where it has no width: equal scores on a finite test set are rounding, not certainty.
        """
        if self.interval is None or self.interval[0] == self.interval[1]:
            return False
        return not self.interval[0] <= 0.0 <= self.interval[1]


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of independent values and its t-interval with n - 1 degrees of freedom, two-sided.

    Args:
        values: at least one.
        confidence: share of such intervals that hold the true mean, if the values are about normal.

    Raises:
        ValueError: there is no value.
    """
    count = len(values)
    if not count:
        raise ValueError("0 values have no mean; give one at least")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean=mean, interval=None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    reach = float(stdtrit(count - 1, (1 + confidence) / 2)) * math.sqrt(variance / count)
    return Estimate(mean=mean, interval=(mean - reach, mean + reach))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Ours minus theirs over the seeds that both have; None where there is none.

    A seed shares its split, its cohorts and its first A between arms, so what it is worth cancels in the difference.
    """
    shared = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in shared]) if shared else None
