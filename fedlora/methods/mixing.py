"""How updates become one: FedStale with its limits, under either correction for who took part, or MIFA."""

from dataclasses import dataclass
from typing import Literal

from fedlora.config import schema
from fedlora.config.method import Stale
from fedlora.values import Own, Recurrence, RoundPlan

Participation = Literal["normalised", "importance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """A beta that follows from what was released in earlier rounds, so it costs no privacy.

    smoothing: what is left of the sums of earlier rounds when those of a round are added, in [0, 1).
    by_client: each remembered update has a beta of its own, fixed when it was sent; else all have one.
    """

    smoothing: float
    by_client: bool = False

    def beta(self, known: Recurrence) -> float:
        """product / energy, within [0, 1]; see `algebra.recurrence` for why. 0 as long as nobody was heard again."""
        return min(1.0, max(0.0, known.product / known.energy)) if known.energy > 0 else 0.0

    def after(self, known: Recurrence, of_the_round: Recurrence) -> Recurrence:
        """What is known once the round is over; a round that says nothing takes nothing away."""
        if of_the_round.energy == 0:
            return known
        return Recurrence(
            product=self.smoothing * known.product + of_the_round.product,
            energy=self.smoothing * known.energy + of_the_round.energy,
        )

    def own(self, before: Own, pair: Recurrence, known: Recurrence) -> Own:
        """Of a client just heard: by its own pairs, or by everybody's before the round as long as it has none."""
        mine = self.after(before.recurrence, pair)
        return Own(recurrence=mine, beta=self.beta(mine if mine.energy > 0 else known))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """FedStale (arXiv 2405.04171). beta: 0 is FedAvg and remembers nothing, 1 is FedVARP.

    everybody: MIFA (arXiv 2106.04159) instead, with beta 1: the step is the sum of weight * newest update over all
        clients that were ever heard, since a participant's factor is its weight and nothing divides.
    by_rate: an update counts times the learning rate of the round / that of the round it was made in.
    """

    beta: float | Adaptive
    everybody: bool = False
    by_rate: bool = False

    @classmethod
    def of(cls, stale: Stale) -> "Mixing":
        """What the config says."""
        if isinstance(stale.beta, str):
            by_client = stale.beta == "adaptive-by-client"
            adaptive = Adaptive(smoothing=stale.smoothing, by_client=by_client)
            return cls(beta=adaptive, by_rate=stale.scale_by_rate)
        everybody = stale.rule == "mifa"
        return cls(beta=stale.beta, everybody=everybody, by_rate=everybody or stale.scale_by_rate)

    @property
    def adaptive(self) -> Adaptive | None:
        """What beta follows from, where it is no constant."""
        return self.beta if isinstance(self.beta, Adaptive) else None

    @property
    def remembers(self) -> bool:
        """Whether the last update of a client is ever used again."""
        return isinstance(self.beta, Adaptive) or self.beta > 0

    def beta_in(self, known: Recurrence) -> float:
        """The beta of a round, one for all clients; 1 where each has its own.

        From what was known before the round: nothing that the round draws has a say in it, or FedStale would be biased.
        """
        if not isinstance(self.beta, Adaptive):
            return self.beta
        return 1.0 if self.beta.by_client else self.beta.beta(known)

    @staticmethod
    def centred(federation: schema.Federation) -> bool:
        """Whether what all updates have in common costs a round no variance.

        So it is where shares are normalised, or a fixed number of clients is drawn.
        """
        return federation.participation == "normalised" or isinstance(federation.cohort, int)

    def steps_without_answers(self, participation: Participation) -> bool:
        """Whether a round that nobody answers says as much as any: its sum is a sample, or everybody's as ever."""
        return self.everybody or participation == "importance"

    def factor(self, client: str, plan: RoundPlan, participation: Participation) -> float:
        """What a participant's update is multiplied by, before `divisor` divides the sum.

        Args:
            client: one that has a weight and a probability in the plan.
            plan: of the round in which it counts.
            participation: importance divides by the probability of being asked, so the mean over all possible
                cohorts is the whole federation's update (FedStale).
        """
        weight = plan.weight[client]
        return (
            weight if self.everybody or participation == "normalised" else weight / plan.probability[client]
        )

    def divisor(self, factors: float, participation: Participation) -> float:
        """What divides the sum, from the participants' summed factors.

        normalised divides by them, so that the shares sum to 1 and a round in which one client answers moves as far
        as a full one (FedSVD); importance has divided already.
        """
        return factors if participation == "normalised" and factors and not self.everybody else 1.0
