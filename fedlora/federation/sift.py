"""Why a reply cannot count. Whatever a client sent, nothing raises."""

import torch
from torch import Tensor

from fedlora.algebra.deltas import trainable
from fedlora.algebra.flat import Layout
from fedlora.federation.ranks import Ranks
from fedlora.values import ClientUpdate, Delta, Refusal, Reply, RoundPlan, ServerState, Side

MOST_ENTRY = 1e6
"""Far beyond what any training gives, and far below what the algebra of float32 could not bear."""


def fault_of(reply: Reply, state: ServerState, plan: RoundPlan, side: Side, ranks: Ranks) -> str | None:
    """Why a reply cannot count, in names, numbers and shapes, never an entry of a tensor; None if it can.

    side: what the round trains; nothing trained on another side counts in it. ranks: who trains which columns of B.
    """
    fault = _fault_of_sender(reply, state, plan)
    if fault is not None or isinstance(reply, Refusal):
        return fault
    return (
        _fault_of_basis(reply, state, plan)
        or _fault_of_tensors(reply.delta, trainable(state.adapters, side))
        or ranks.fault(reply, state.adapters.basis)
    )


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


def _fault_of_tensors(delta: Delta, needed: Delta) -> str | None:
    for wanted, got in ((needed.sites, delta.sites), (needed.a, delta.a), (needed.head, delta.head)):
        missing, unknown = sorted(wanted.keys() - got.keys()), got.keys() - wanted.keys()
        if missing or unknown:
            return f"{len(missing)} tensors missing {missing[:1]}, {len(unknown)} unknown"
        for name in sorted(wanted):
            fault = _fault_of_shape(name, got[name], wanted[name])
            if fault is not None:
                return fault
    # One pass over all numbers, since a round may hear thousands; one NaN makes both ends NaN, within no bound.
    row = Layout.of(delta).flat(delta)
    if not row.numel() or all(abs(float(end)) <= MOST_ENTRY for end in torch.aminmax(row)):
        return None
    named = [*delta.sites.items(), *delta.a.items(), *delta.head.items()]
    return next(filter(None, (_fault_of_numbers(name, tensor) for name, tensor in sorted(named, key=_name))))


def _name(pair: tuple[str, Tensor]) -> str:
    return pair[0]


def _fault_of_shape(name: str, got: Tensor, wanted: Tensor) -> str | None:
    if got.shape != wanted.shape:
        return f"{name!r} has shape {tuple(got.shape)}, need {tuple(wanted.shape)}"
    if got.dtype != wanted.dtype:
        return f"{name!r} is {got.dtype}, need {wanted.dtype}"
    return None


def _fault_of_numbers(name: str, got: Tensor) -> str | None:
    if not bool(torch.isfinite(got).all()):
        return f"{name!r} has {int((~torch.isfinite(got)).sum())} entries that are not finite"
    if got.numel() and float(got.abs().max()) > MOST_ENTRY:
        return f"{name!r} has entries beyond {MOST_ENTRY:g}, which no training gives"
    return None
