"""How updates become one: FedStale with its limits, under either correction for who took part."""

from dataclasses import dataclass
from typing import Literal

from fedlora.values import RoundPlan

Participation = Literal["normalised", "importance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """FedStale (arXiv 2405.04171). beta: 0 is FedAvg and remembers nothing, 1 is FedVARP."""

    beta: float

    @property
    def remembers(self) -> bool:
        """Whether the last update of a client is ever used again."""
        return self.beta > 0

    def factor(self, client: str, plan: RoundPlan, participation: Participation) -> float:
        """What a participant's update is multiplied by, before `divisor` divides the sum.

        Args:
            client: one that has a weight and a probability in the plan.
            plan: of the round in which it counts.
            participation: importance divides by the probability of being asked, so the mean over all possible
                cohorts is the whole federation's update (FedStale).
        """
        weight = plan.weight[client]
        return weight if participation == "normalised" else weight / plan.probability[client]

    def divisor(self, factors: float, participation: Participation) -> float:
        """What divides the sum, from the participants' summed factors.

        normalised divides by them, so that the shares sum to 1 and a round in which one client answers moves as far
        as a full one (FedSVD); importance has divided already.
        """
        return factors if participation == "normalised" and factors else 1.0
