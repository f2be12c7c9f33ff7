"""How updates of rounds with other learning rates count together: times the rate now over that they were made with.

What is remembered is summed up at the first round's rate, so that a round multiplies one sum by one number.
"""

from dataclasses import dataclass

from fedlora.algebra.deltas import scale
from fedlora.config.schema import Federation
from fedlora.federation.work import first_rate_over
from fedlora.methods.mixing import Mixing
from fedlora.values import Delta


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """mixing: whether rates count at all; where they do not, every number here is exactly 1."""

    mixing: Mixing
    federation: Federation

    def in_memory(self, at: int) -> float:
        """What an update of round `at` is multiplied by in the sum of remembered ones, beside share and beta."""
        return first_rate_over(at, self.federation) if self.mixing.by_rate else 1.0

    def now(self, at: int, number: int) -> float:
        """What an update of round `at` is multiplied by in round `number`; 1 where they are one round."""
        return self.in_memory(at) / self.in_memory(number)

    def as_now(self, delta: Delta, at: int, number: int) -> Delta:
        """The update of round `at` as it counts in round `number`."""
        now = self.now(at, number)
        return delta if now == 1 else scale(delta, now)
