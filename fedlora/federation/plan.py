"""Who is asked in the next round, how likely that was, and how much each counts; pure."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from fedlora.config import schema
from fedlora.errors import ConfigError
from fedlora.seeds import seed_for
from fedlora.values import Member, RoundPlan, ServerState


def plan(
    state: ServerState, members: Sequence[Member], *, run: str, federation: schema.Federation, seed: int
) -> RoundPlan:
    """The plan of round `state.round + 1`, the same for equal arguments in whatever order the members come.

    Probability and weight stand for every member, not for the cohort alone: a late reply of an earlier round
    counts too.

    Args:
        state: after the last round.
        members: everybody who may be asked; nobody twice.
        run: name of the run, echoed by every reply.
        federation: `cohort` and `weighting` are read.
        seed: of the run.

    Returns:
        A plan with a sorted cohort. A number gives a cohort of that size, drawn uniformly; {probability}
        draws each client on its own, and the cohort may be empty.

    Raises:
        ConfigError: no members, a client twice, a cohort larger than the federation, a client without a
            probability, or weighting by examples where a client declares none.
    """
    clients = sorted(member.client for member in members)
    _require_a_roster(clients)
    round_ = state.round + 1
    draw = torch.Generator().manual_seed(seed_for(seed, "cohort", round_))
    tickets = dict(
        zip(clients, torch.rand(len(clients), generator=draw, dtype=torch.float64).tolist(), strict=True)
    )
    probability = _probability(clients, federation.cohort)
    return RoundPlan(
        run=run,
        round=round_,
        cohort=_cohort(tickets, probability, federation.cohort),
        probability=probability,
        weight=weights(members, federation.weighting),
    )


def require_plannable(members: Sequence[Member], federation: schema.Federation) -> None:
    """Passes only a roster that every round can be planned for; asked before anything is written.

    Raises:
        ConfigError: as `plan` would, or a probability is given for a client that is no member.
    """
    clients = sorted(member.client for member in members)
    _require_a_roster(clients)
    _probability(clients, federation.cohort)
    weights(members, federation.weighting)
    named = getattr(federation.cohort, "probability", None)
    strangers = sorted(set(named) - set(clients)) if isinstance(named, dict) else []
    if strangers:
        raise ConfigError(
            f"federation.cohort.probability names {strangers[:8]}, who are no members; of {len(clients)} members the "
            f"first are {clients[:8]}"
        )


def _require_a_roster(clients: Sequence[str]) -> None:
    if not clients:
        raise ConfigError("0 clients are members of the run; let at least 1 join before a round is planned")
    twice = sorted({client for client, following in pairwise(clients) if client == following})
    if twice:
        raise ConfigError(
            f"clients {twice} are members more than once; give each data owner a name of its own"
        )


def _probability(clients: Sequence[str], cohort: int | schema.IndependentCohort) -> dict[str, float]:
    if isinstance(cohort, int):
        if cohort > len(clients):
            raise ConfigError(
                f"federation.cohort {cohort} exceeds the {len(clients)} members; lower it or add clients"
            )
        return dict.fromkeys(clients, cohort / len(clients))
    if not isinstance(cohort.probability, dict):
        return dict.fromkeys(clients, cohort.probability)
    missing = [client for client in clients if client not in cohort.probability]
    if missing:
        raise ConfigError(
            f"federation.cohort.probability lacks {missing}; add a number for each, or give one for all"
        )
    return {client: cohort.probability[client] for client in clients}


def _cohort(
    tickets: Mapping[str, float], probability: Mapping[str, float], cohort: int | schema.IndependentCohort
) -> tuple[str, ...]:
    # Tickets are uniform in [0, 1): the lowest k of them are a uniform draw without replacement.
    if isinstance(cohort, int):
        return tuple(sorted(sorted(tickets, key=lambda client: (tickets[client], client))[:cohort]))
    return tuple(client for client, ticket in sorted(tickets.items()) if ticket < probability[client])


def weights(members: Sequence[Member], weighting: str) -> dict[str, float]:
    """Each member's share of the whole; they sum to 1.

    Raises:
        ConfigError: weighting by examples where a member declares none.
    """
    if weighting == "uniform":
        return {client: 1 / len(members) for client in sorted(member.client for member in members)}
    examples = {
        member.client: member.examples for member in sorted(members, key=lambda member: member.client)
    }
    silent = {client: count for client, count in examples.items() if count < 1}
    if silent:
        raise ConfigError(
            f"federation.weighting is examples, but {silent} are declared; declare at least 1 or use uniform"
        )
    total = sum(examples.values())
    return {client: count / total for client, count in examples.items()}
