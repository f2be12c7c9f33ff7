"""How many clients a round asks, and how often one is asked, as far as the config alone says."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.config.schema import Federation


def expected_cohort(federation: "Federation", clients: int) -> float:
    """Clients asked in a round, on average, of so many."""
    cohort = federation.cohort
    if isinstance(cohort, int):
        return cohort
    if isinstance(cohort.probability, dict):
        return sum(cohort.probability.values())
    return cohort.probability * clients


def most_asked(clients: int, federation: "Federation") -> int:
    """Rounds of a run in which one client can be asked at most, whatever is drawn."""
    cohort, rounds = federation.cohort, federation.rounds
    if not isinstance(cohort, int) or not federation.reshuffle:
        return rounds
    return math.ceil(rounds / (clients // cohort))
