"""Who is asked in the next round, how likely that was, and how much each counts; pure.

A hundred thousand members cost two arrays and their names, looked through once; a round then costs a draw of numbers,
and no object but for those it asks.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.config import schema
from fedlora.errors import ConfigError
from fedlora.seeds import seed_for
from fedlora.values import Member, RoundPlan, ServerState


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shares(Mapping[str, float]):
    """A number of each client, worked out of an array when asked for.

    clients: sorted names, nobody twice. numbers: (clients,).
    """

    clients: tuple[str, ...]
    numbers: NDArray[np.float64]

    def __getitem__(self, client: str) -> float:
        place = bisect_left(self.clients, client)
        if place == len(self.clients) or self.clients[place] != client:
            raise KeyError(client)
        return float(self.numbers[place])

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roll:
    """Everybody who may be asked in any round of a run. clients: sorted; cohort, reshuffle: as in `schema.Federation`.

    probability, weight: as in `RoundPlan`, the same in every round.
    """

    clients: tuple[str, ...]
    probability: Shares
    weight: Shares
    cohort: int | schema.IndependentCohort
    reshuffle: bool

    @classmethod
    def of(cls, members: Sequence[Member], federation: schema.Federation) -> "Roll":
        """The roll of these members; raises ConfigError as `plan` does."""
        clients = _names(members)
        _require_a_roster(clients)
        return cls(
            clients=clients,
            probability=_probability(clients, federation.cohort),
            weight=weights(members, federation.weighting),
            cohort=federation.cohort,
            reshuffle=federation.reshuffle,
        )

    def plan(self, round_: int, *, run: str, seed: int) -> RoundPlan:
        """The plan of that round; see `plan`."""
        places = self._in_turn(round_, seed) if self.reshuffle else self._drawn(self._tickets(seed, round_))
        return RoundPlan(
            run=run,
            round=round_,
            cohort=tuple(self.clients[place] for place in places.tolist()),
            probability=self.probability,
            weight=self.weight,
        )

    def _tickets(self, seed: int, *of: str | int) -> NDArray[np.float64]:
        """A number in [0, 1) for each client."""
        draw = torch.Generator().manual_seed(seed_for(seed, "cohort", *of))
        return torch.rand(len(self.clients), generator=draw, dtype=torch.float64).numpy()

    def _in_turn(self, round_: int, seed: int) -> NDArray[np.int64]:
        """Places of those whose turn it is in this lap, sorted; one order a lap."""
        assert isinstance(self.cohort, int)
        lap, turn = divmod(round_ - 1, len(self.clients) // self.cohort)
        order = np.argsort(self._tickets(seed, "lap", lap), kind="stable")
        return np.sort(order[turn * self.cohort : (turn + 1) * self.cohort])

    def _drawn(self, tickets: NDArray[np.float64]) -> NDArray[np.int64]:
        """Places of those who are asked, sorted."""
        # Tickets are uniform in [0, 1): the lowest k of them are a uniform draw without replacement.
        if not isinstance(self.cohort, int):
            return np.flatnonzero(tickets < self.probability.numbers)
        last = np.partition(tickets, self.cohort - 1)[self.cohort - 1]
        below, level = np.flatnonzero(tickets < last), np.flatnonzero(tickets == last)
        return np.sort(np.concatenate([below, level[: self.cohort - len(below)]]))


def plan(
    state: ServerState, members: Sequence[Member], *, run: str, federation: schema.Federation, seed: int
) -> RoundPlan:
    """The plan of round `state.round + 1`, the same for equal arguments in whatever order the members come.

    Under `reshuffle` a client's chance depends on who was asked earlier in the lap; `probability` is that of a round
    drawn at random from a lap, so importance corrects a lap as a whole.

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
    return Roll.of(members, federation).plan(state.round + 1, run=run, seed=seed)


def require_plannable(members: Sequence[Member], federation: schema.Federation) -> None:
    """Passes only a roster that every round can be planned for; asked before anything is written.

    Raises:
        ConfigError: as `plan` would, or a probability or a rank is given for a client that is no member.
    """
    clients = Roll.of(members, federation).clients
    named = getattr(federation.cohort, "probability", None)
    for key, names in (("cohort.probability", named), ("ranks", federation.ranks)):
        strangers = sorted(set(names) - set(clients)) if isinstance(names, dict) else []
        if strangers:
            raise ConfigError(
                f"federation.{key} names {strangers[:8]}, who are no members; of {len(clients)} members the first are "
                f"{list(clients[:8])}"
            )


def _require_a_roster(clients: Sequence[str]) -> None:
    if not clients:
        raise ConfigError("0 clients are members of the run; let at least 1 join before a round is planned")
    twice = sorted({client for client, following in pairwise(clients) if client == following})
    if twice:
        raise ConfigError(
            f"clients {twice} are members more than once; give each data owner a name of its own"
        )


def _names(members: Sequence[Member]) -> tuple[str, ...]:
    return tuple(sorted(member.client for member in members))


def _probability(clients: tuple[str, ...], cohort: int | schema.IndependentCohort) -> Shares:
    if isinstance(cohort, int):
        if cohort > len(clients):
            raise ConfigError(
                f"federation.cohort {cohort} exceeds the {len(clients)} members; lower it or add clients"
            )
        return _same(clients, cohort / len(clients))
    if not isinstance(cohort.probability, dict):
        return _same(clients, cohort.probability)
    missing = [client for client in clients if client not in cohort.probability]
    if missing:
        raise ConfigError(
            f"federation.cohort.probability lacks {missing}; add a number for each, or give one for all"
        )
    return Shares(clients=clients, numbers=np.array([cohort.probability[client] for client in clients]))


def _same(clients: tuple[str, ...], number: float) -> Shares:
    """The one number for each; it is there once."""
    return Shares(clients=clients, numbers=np.broadcast_to(np.float64(number), len(clients)))


def weights(members: Sequence[Member], weighting: str) -> Shares:
    """Each member's share of the whole; they sum to 1.

    Raises:
        ConfigError: weighting by examples where a member declares none.
    """
    clients = _names(members)
    if weighting == "uniform":
        return _same(clients, 1 / max(1, len(clients)))
    in_order = sorted(members, key=lambda member: member.client)
    silent = {member.client: member.examples for member in in_order if member.examples < 1}
    if silent:
        raise ConfigError(
            f"federation.weighting is examples, but {silent} are declared; declare at least 1 or use uniform"
        )
    examples = np.array([member.examples for member in in_order], dtype=np.float64)
    return Shares(clients=clients, numbers=examples / sum(member.examples for member in members))
