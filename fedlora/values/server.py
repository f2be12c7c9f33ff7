"""What a server knows: its clients, its state, what a round was to be and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedlora.values.adapters import Adapters, Delta, Gauges, Site
from fedlora.values.privacy import DpEvent

if TYPE_CHECKING:  # the nouns alone cost no import of torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One data owner on the server's roster. `examples` is the declared, public number of records."""

    client: str
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """How much of what was remembered came back in fresh updates, over the rounds so far, older ones counting less.

    product: sum of <fresh, remembered>. energy: sum of |remembered|^2. Both 0 before a client was heard again.
    """

    product: float = 0.0
    energy: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The same of one client's updates alone, and the beta that its remembered one has until it is heard again."""

    recurrence: Recurrence = Recurrence()
    beta: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """All that a resume needs, beside the remembered updates that the store keeps by client.

    round: rounds completed.
    frame: orthonormal rows (r, d_in) a site; spans the row space of A. When A leaves it a new one begins, and all that
        was kept in the old one is forgotten: gauges, memory, moments, what adaptive betas know.
    gauges: from each basis that a late update may still carry into the frame, newest last.
    memory: sum over clients of weight * remembered update, in the frame (FedStale); times its own beta, if it has one.
    remembered: the round of each client's last update that counted.
    recurrence: what an adaptive beta is worked out of; never touched where beta is a number.
    own: of each client that has a beta of its own.
    moments: what the server's optimiser remembers, in the frame: sums of steps, then of their squares, if it has them.
    """

    round: int
    adapters: Adapters
    frame: Mapping[Site, Tensor]
    gauges: tuple[Gauges, ...]
    memory: Delta
    remembered: Mapping[str, int] = field(default_factory=dict)
    recurrence: Recurrence = Recurrence()
    own: Mapping[str, Own] = field(default_factory=dict)
    moments: tuple[Delta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """Who is asked in a round, decided before anything is sent.

    probability: of being asked, for each member. weight: its share alpha of the whole, summing to 1 over all members.
    """

    run: str
    round: int
    cohort: tuple[str, ...]
    probability: Mapping[str, float]
    weight: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """What is kept of an update that counted, once its numbers are in the sum.

    round: of the request that it answers. length: Euclidean, of all its numbers together, float64. numbers: how many
        were trained.
    spent: the event of its training; None only where privacy is off.
    """

    round: int
    length: float
    numbers: int
    spent: DpEvent | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What became of a plan: who answered, who refused and why, whose reply was rejected and why; all sorted.

    accuracy: by client, what those who tell it told. released: by client, of each update that counted.
    """

    round: int
    asked: tuple[str, ...]
    answered: tuple[str, ...]
    refused: Mapping[str, str]
    rejected: Mapping[str, str]
    accuracy: Mapping[str, float]
    released: Mapping[str, Released] = field(default_factory=dict)
