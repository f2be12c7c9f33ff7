"""Many updates become one: fresh ones of a round, remembered ones of the absent (FedStale, arXiv 2405.04171).

With memory = sum over all clients of weight * stale, the mix touches the participants only, however many
clients there are. Sums run in sorted order of the clients, so a result never depends on who answered first.
"""

from collections.abc import Mapping

from fedlora.algebra.deltas import add, scale
from fedlora.values import Delta


def mix(
    fresh: Mapping[str, Delta],
    stale: Mapping[str, Delta],
    memory: Delta,
    shares: Mapping[str, float],
    beta: float,
) -> Delta:
    """sum over participants of shares * (fresh - beta * stale), plus beta * memory.

    beta 0 is FedAvg, beta 1 is FedVARP (arXiv 2207.14130), between is FedStale. With shares weight /
    probability it is unbiased for every beta, whatever is remembered, as long as memory is the weighted sum
    of the same stale updates.

    Args:
        fresh: this round's update of each participant, in the basis of memory.
        stale: its update of the last time it took part; absent means zero.
        memory: the weighted sum of the stale updates of all clients, participants included.
        shares: factor of each participant; covers `fresh`.
        beta: trust in the remembered updates, 0 to 1.

    Raises:
        BasisError: an update is not in the basis of memory.
        ShapeError: names or shapes differ.
    """
    mixed = scale(memory, beta)
    for client in sorted(fresh):
        mixed = add(mixed, fresh[client], shares[client])
        if beta and client in stale:
            mixed = add(mixed, stale[client], -beta * shares[client])
    return mixed


def remember(
    memory: Delta, fresh: Mapping[str, Delta], stale: Mapping[str, Delta], weight: Mapping[str, float]
) -> Delta:
    """The memory once each participant's fresh update has taken the place of its stale one.

    Args:
        memory: sum over all clients of weight * stale.
        fresh: what is to be remembered, in the basis of memory.
        stale: what was remembered of the same clients; absent means zero.
        weight: share of each participant in the whole.

    Raises:
        BasisError: an update is not in the basis of memory.
        ShapeError: names or shapes differ.
    """
    for client in sorted(fresh):
        memory = add(memory, fresh[client], weight[client])
        if client in stale:
            memory = add(memory, stale[client], -weight[client])
    return memory
