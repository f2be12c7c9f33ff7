"""The nouns of fedlora: frozen values, no behaviour beyond validation."""

from fedlora.values.adapters import FRAME, Adapters, Delta, Factors, Gauges, Side, Site
from fedlora.values.exchange import (
    ClientUpdate,
    LocalWork,
    Origin,
    Refusal,
    RefusalReason,
    Reply,
    TrainRequest,
)
from fedlora.values.privacy import DpEvent, Mechanism, Sampling, Witness
from fedlora.values.server import Member, Own, Recurrence, Released, RoundPlan, RoundReport, ServerState

__all__ = [
    "FRAME",
    "Adapters",
    "ClientUpdate",
    "Delta",
    "DpEvent",
    "Factors",
    "Gauges",
    "LocalWork",
    "Mechanism",
    "Member",
    "Origin",
    "Own",
    "Recurrence",
    "Refusal",
    "RefusalReason",
    "Released",
    "Reply",
    "RoundPlan",
    "RoundReport",
    "Sampling",
    "ServerState",
    "Side",
    "Site",
    "TrainRequest",
    "Witness",
]
