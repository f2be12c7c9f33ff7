"""Which replies of a round count, and why the others do not. Whatever a client sent, nothing raises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.values import Adapters, ClientUpdate, Delta, Refusal, Reply, RoundPlan, ServerState

MOST_ENTRY = 1e6
"""Far beyond what any training gives, and far below what the algebra of float32 could not bear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """By client, sorted: the one update that counts, why it refused, why a reply of it was rejected."""

    accepted: Mapping[str, ClientUpdate]
    refused: Mapping[str, str]
    rejected: Mapping[str, str]


def sift(state: ServerState, plan: RoundPlan, replies: Sequence[Reply]) -> Heard:
    """What counts of all that arrived, in whatever order it did: of each client its newest sound update.

    Args:
        state: before the round is absorbed.
        plan: of the round that ends.
        replies: from anyone, of this round or earlier ones.
    """
    updates: dict[str, list[ClientUpdate]] = {}
    refused: dict[str, list[str]] = {}
    rejected: dict[str, list[str]] = {}
    for reply in replies:
        fault = _fault(reply, state, plan)
        if fault is not None:
            rejected.setdefault(reply.client, []).append(fault)
        elif isinstance(reply, Refusal):
            refused.setdefault(reply.client, []).append(reply.reason.value)
        else:
            updates.setdefault(reply.client, []).append(reply)
    accepted: dict[str, ClientUpdate] = {}
    for client in sorted(updates):
        newest = max(update.round for update in updates[client])
        rivals = [update for update in updates[client] if update.round == newest]
        if len(rivals) == 1:
            accepted[client] = rivals[0]
            surplus = [
                f"update of round {u.round} came with one of round {newest}"
                for u in updates[client]
                if u.round < newest
            ]
        else:
            # Which of them is meant cannot be known, and the order of arrival must not decide.
            surplus = [f"{len(rivals)} updates for round {newest}; only one counts"]
        if surplus:
            rejected.setdefault(client, []).extend(surplus)
    return Heard(accepted=accepted, refused=_joined(refused), rejected=_joined(rejected))


def _joined(reasons: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {client: "; ".join(sorted(set(reasons[client]))) for client in sorted(reasons)}


def _fault(reply: Reply, state: ServerState, plan: RoundPlan) -> str | None:
    """Why a reply cannot count, in names, numbers and shapes, never an entry of a tensor; None if it can."""
    fault = _fault_of_sender(reply, state, plan)
    if fault is not None or isinstance(reply, Refusal):
        return fault
    return _fault_of_basis(reply, state, plan) or _fault_of_tensors(reply.delta, state.adapters)


def _fault_of_sender(reply: Reply, state: ServerState, plan: RoundPlan) -> str | None:
    if reply.run != plan.run:
        return f"reply of another run than {plan.run!r}"
    if reply.client not in plan.weight:
        return f"unknown client {reply.client!r}"
    if reply.round < 1:
        return f"reply of round {reply.round}; rounds begin at 1"
    if reply.round > plan.round:
        return f"reply of round {reply.round}, which lies ahead of {plan.round}"
    if reply.round == plan.round and reply.client not in plan.cohort:
        return f"was not asked in round {plan.round}"
    last = state.remembered.get(reply.client, 0)
    if isinstance(reply, ClientUpdate) and reply.round <= last:
        return f"update of round {reply.round}, but one of round {last} has counted already"
    return None


def _fault_of_basis(update: ClientUpdate, state: ServerState, plan: RoundPlan) -> str | None:
    got, current, oldest = update.delta.basis, state.adapters.basis, state.gauges[0].basis
    if update.round == plan.round and got != current:
        return f"trained in basis {got}, but round {plan.round} was sent in {current}"
    if not 0 <= got <= current:
        return f"trained in basis {got}, which never was (now {current})"
    if got < oldest:
        return (
            f"trained in basis {got}, but gauges reach back only to {oldest} (now {current}); "
            f"raise federation.keep_gauges to {current - got} or lower federation.deadline_s"
        )
    return None


def _fault_of_tensors(delta: Delta, adapters: Adapters) -> str | None:
    for wanted, got in (
        ({site: factors.b for site, factors in adapters.sites.items()}, delta.sites),
        (adapters.head, delta.head),
    ):
        missing, unknown = sorted(wanted.keys() - got.keys()), got.keys() - wanted.keys()
        if missing or unknown:
            return f"{len(missing)} tensors missing {missing[:1]}, {len(unknown)} unknown"
        for name in sorted(wanted):
            fault = _fault_of_tensor(name, got[name], wanted[name])
            if fault is not None:
                return fault
    return None


def _fault_of_tensor(name: str, got: Tensor, wanted: Tensor) -> str | None:
    if got.shape != wanted.shape:
        return f"{name!r} has shape {tuple(got.shape)}, need {tuple(wanted.shape)}"
    if got.dtype != wanted.dtype:
        return f"{name!r} is {got.dtype}, need {wanted.dtype}"
    if not bool(torch.isfinite(got).all()):
        return f"{name!r} has {int((~torch.isfinite(got)).sum())} entries that are not finite"
    if got.numel() and float(got.abs().max()) > MOST_ENTRY:
        return f"{name!r} has entries beyond {MOST_ENTRY:g}, which no training gives"
    return None
