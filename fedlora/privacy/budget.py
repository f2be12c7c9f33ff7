"""The limit of one client, asked before any record is touched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from fedlora.config.node import Budget as NodeBudget
from fedlora.config.schema import Privacy
from fedlora.privacy.accountants import epsilon
from fedlora.values import DpEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a client may ever spend on one data set: this epsilon at this delta, so many participations."""

    target_epsilon: float
    target_delta: float
    max_participations: int
    accountant: str

    def __post_init__(self) -> None:
        if not (self.target_epsilon > 0 and math.isfinite(self.target_epsilon)):
            raise ValueError(f"target_epsilon {self.target_epsilon} must be positive and finite")
        if not 0 < self.target_delta < 1:
            raise ValueError(f"target_delta {self.target_delta} must lie strictly between 0 and 1")
        if self.max_participations < 1:
            raise ValueError(f"max_participations {self.max_participations} must be at least 1")

    @classmethod
    def of(cls, section: Privacy | NodeBudget) -> "Budget":
        """The budget that a section of YAML sets: a run's `privacy`, or `budget` of a node."""
        return cls(
            target_epsilon=section.target_epsilon,
            target_delta=section.target_delta,
            max_participations=section.max_participations,
            accountant=section.accountant,
        )


def would_exceed(
    spent: Sequence[tuple[DpEvent, ...]], participation: tuple[DpEvent, ...], budget: Budget
) -> bool:
    """Whether one more participation would pass the number allowed or bring epsilon above its target.

    The usual ledger repeats one participation, whose noise was calibrated for all of them. Then epsilon of the
    whole allowance bounds epsilon of every part of it, and that one number (remembered) answers each round.

    Args:
        spent: the events of each participation so far.
        participation: those of the one in question.
        budget: of this data set.
    """
    if len(spent) + 1 > budget.max_participations:
        return True
    whole = [replace(event, steps=event.steps * budget.max_participations) for event in participation]
    if all(events == participation for events in spent) and _epsilon(whole, budget) <= budget.target_epsilon:
        return False
    return not _epsilon([*chain.from_iterable(spent), *participation], budget) <= budget.target_epsilon


def _epsilon(events: Sequence[DpEvent], budget: Budget) -> float:
    return epsilon(events, budget.target_delta, budget.accountant)
