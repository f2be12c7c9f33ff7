"""How updates become one: FedStale with its limits, under either correction for who took part."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from fedlora.algebra.mixing import mix
from fedlora.values import Delta, RoundPlan

Participation = Literal["normalised", "importance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """FedStale (arXiv 2405.04171). beta: 0 is FedAvg and remembers nothing, 1 is FedVARP."""

    beta: float

    @property
    def remembers(self) -> bool:
        """Whether the last update of a client is ever used again."""
        return self.beta > 0

    def shares(
        self, participants: Collection[str], plan: RoundPlan, participation: Participation
    ) -> dict[str, float]:
        """The factor of each participant's update.

        Args:
            participants: whoever answered; all have a weight and a probability in the plan.
            plan: of the round in which they count.
            participation: normalised divides by the participants' total weight, so the factors sum to 1 and a
                round in which one client answers moves as far as a full one (FedSVD); importance divides by
                the probability of being asked, so the mean over all possible cohorts is the whole
                federation's update (FedStale).
        """
        match participation:
            case "normalised":
                total = sum(plan.weight[client] for client in sorted(participants))
                return {client: plan.weight[client] / total for client in sorted(participants)}
            case "importance":
                return {
                    client: plan.weight[client] / plan.probability[client] for client in sorted(participants)
                }

    def mixed(
        self,
        fresh: Mapping[str, Delta],
        stale: Mapping[str, Delta],
        memory: Delta,
        shares: Mapping[str, float],
    ) -> Delta:
        """One update out of many, in the basis of memory; see `algebra.mixing.mix`."""
        return mix(fresh, stale, memory, shares, self.beta)
