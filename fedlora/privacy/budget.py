"""The limit of one client, asked before any record is touched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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


def would_exceed(ledger_events: Sequence[DpEvent], next_event: DpEvent, budget: Budget) -> bool:
    """Whether one more participation would pass the number allowed or bring epsilon above its target.

    The usual ledger repeats one event whose noise was calibrated for all participations. Then epsilon of the
    whole allowance bounds epsilon of every part of it, and that one number (remembered) answers each round.
    """
    if len(ledger_events) + 1 > budget.max_participations:
        return True
    repeated = all(event == next_event for event in ledger_events)
    whole = replace(next_event, steps=next_event.steps * budget.max_participations)
    if repeated and _epsilon([whole], budget) <= budget.target_epsilon:
        return False
    return not _epsilon([*ledger_events, next_event], budget) <= budget.target_epsilon


def _epsilon(events: Sequence[DpEvent], budget: Budget) -> float:
    return epsilon(events, budget.target_delta, budget.accountant)
