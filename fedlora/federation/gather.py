"""A round's replies, as they come: each one that counts goes into the sums and is let go.

Sums run in the order of the plan, late updates after it, so that a result never depends on who answered first: an
update that comes before its turn waits. A cohort that answers in that order needs room for one update at a time. Of two
updates of one client for one round, which no cohort yields, the first counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.algebra.deltas import empty_memory, into_frame
from fedlora.algebra.flat import Layout
from fedlora.algebra.mixing import RunningMix, RunningProducts
from fedlora.algebra.recurrence import RunningRecurrence
from fedlora.config import schema
from fedlora.errors import IncompleteError
from fedlora.federation.ranks import ColumnMeans, Ranks, trained_numbers
from fedlora.federation.rates import Rates
from fedlora.federation.remembered import Memory
from fedlora.federation.sift import fault_of
from fedlora.methods import Method
from fedlora.values import (
    ClientUpdate,
    Delta,
    Own,
    Recurrence,
    Refusal,
    Released,
    Reply,
    RoundPlan,
    RoundReport,
    ServerState,
    Side,
    Site,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What the replies of a round amount to. heard: the round of each update that counted, by client.

    products: the mean of (change of B) (change of A), where the method's mean asks for it.
    recurrence: with this round's, as the next round's beta needs it. own: of the clients that were heard.
    """

    step: Delta
    memory: Delta
    products: Mapping[Site, Tensor]
    recurrence: Recurrence
    own: Mapping[str, Own]
    heard: Mapping[str, int]
    report: RoundReport


def gather(
    state: ServerState,
    plan: RoundPlan,
    replies: Iterable[Reply],
    *,
    memory: Memory,
    method: Method,
    federation: schema.Federation,
    enough: int | None = None,
) -> Gathered:
    """What the replies of a round amount to: all, or, where so many are `enough`, until so many clients' count.

    Args:
        state: what the last round left.
        plan: of the round that the replies end.
        replies: from anyone, of this round or earlier ones; none is held longer than until its turn.
        memory: recalls what the state remembers, and keeps what it will.
        method: its mixing. federation: its `participation`, `ranks` and the kind of its cohort.
        enough: see `Federation.enough`.

    Raises:
        IncompleteError: the plan is not of the next round, or a remembered update is missing.
    """
    gathering = Gathering(state, plan, memory=memory, method=method, federation=federation)
    for reply in replies:
        gathering.take(reply)
        if enough is not None and gathering.counting >= enough:
            break
    return gathering.close()


class Gathering:
    """Takes replies one by one; `close` says what they amount to. Whatever a client sent, nothing raises."""

    def __init__(
        self,
        state: ServerState,
        plan: RoundPlan,
        *,
        memory: Memory,
        method: Method,
        federation: schema.Federation,
    ) -> None:
        """See `gather`."""
        if plan.round != state.round + 1:
            raise IncompleteError(
                f"the plan is of round {plan.round}, but the state has completed {state.round}; plan the next one"
            )
        self._state, self._plan, self._memory = state, plan, memory
        self._mixing, self._federation = method.mixing, federation
        self._rates = Rates(mixing=method.mixing, federation=federation)
        self._ranks = Ranks.of(state.adapters, federation)
        self._columns = ColumnMeans(self._ranks)
        self._gauges = {known.basis: known for known in state.gauges}
        self._side: Side = method.side(plan.round)
        self._own_b = method.own_b
        # What is remembered is shaped like B; a round that trains A mixes what is fresh alone.
        nothing = empty_memory(state.adapters, self._side)
        self._mix = RunningMix(state.memory if self._mixing.remembers else nothing, self._gauges)
        self._products = RunningProducts() if method.mean.products else None
        centred = self._mixing.centred(federation)
        self._recurrence = (
            RunningRecurrence(self._mix.layout, centred=centred) if self._mixing.adaptive else None
        )
        self._beta = self._mixing.beta_in(state.recurrence)
        self._own: dict[str, Own] = {}
        self._factors = 0.0
        self._turn = 0
        self._spoken: set[str] = set()
        self._waiting: dict[str, ClientUpdate] = {}
        self._late: dict[str, ClientUpdate] = {}
        self._heard: dict[str, int] = {}
        self._accuracy: dict[str, float] = {}
        self._released: dict[str, Released] = {}
        self._refused: dict[str, set[str]] = {}
        self._rejected: dict[str, set[str]] = {}

    @property
    def counting(self) -> int:
        """Clients of whom an update counts so far."""
        return len(self._heard.keys() | self._waiting.keys() | self._late.keys())

    def take(self, reply: Reply) -> None:
        """The reply is counted, or noted as refused or rejected, or waits for its turn.

        Raises:
            IncompleteError: what is remembered of its client is missing.
        """
        fault = fault_of(reply, self._state, self._plan, self._side, self._ranks)
        if fault is not None:
            self._reject(reply.client, fault)
        elif isinstance(reply, Refusal):
            self._refused.setdefault(reply.client, set()).add(reply.reason.value)
        elif reply.round < self._plan.round:
            self._take_late(reply)
        elif reply.client in self._heard or reply.client in self._waiting:
            self._reject(reply.client, f"another update for round {reply.round} came first; only one counts")
        else:
            self._waiting[reply.client] = reply
        # A faulty one may be followed by one that counts, so it does not end its sender's turn.
        if fault is None and reply.round == self._plan.round:
            self._spoken.add(reply.client)
            self._fold_whose_turn_it_is()

    def close(self) -> Gathered:
        """All who waited are counted, the newest late update of each client that sent none in time included."""
        for client in self._plan.cohort:
            if client in self._waiting:
                self._fold(self._waiting.pop(client))
        for client in sorted(self._late):
            late = self._late[client]
            if client in self._heard:
                self._reject(
                    client, f"update of round {late.round} came with one of round {self._plan.round}"
                )
            else:
                self._fold(late)
        basis, participation = self._state.adapters.basis, self._federation.participation
        divisor = self._mixing.divisor(self._factors, participation)
        beta = self._beta / self._rates.in_memory(self._plan.round)
        step = self._mix.mixed(basis, beta, divisor)
        if self._own_b:
            # The mean of all clients' B's moves by the shares of those who moved theirs; nobody stands for the others.
            step = replace(step, sites=self._mix.mixed(basis, beta, 1.0).sites)
        return Gathered(
            step=self._columns.of(step, self._plan, participation, divisor),
            memory=self._mix.memory() if self._mixing.remembers else self._state.memory,
            products={} if self._products is None else self._products.mean(divisor),
            recurrence=self._known(),
            own=self._own,
            heard=self._heard,
            report=self._report(),
        )

    def _take_late(self, update: ClientUpdate) -> None:
        known = self._late.get(update.client)
        newer = update if known is None or update.round > known.round else known
        if known is not None:
            older = known if newer is update else update
            self._reject(update.client, f"update of round {older.round} came with one of round {newer.round}")
        self._late[update.client] = newer

    def _fold_whose_turn_it_is(self) -> None:
        cohort = self._plan.cohort
        while self._turn < len(cohort) and cohort[self._turn] in self._spoken:
            update = self._waiting.pop(cohort[self._turn], None)
            if update is not None:
                self._fold(update)
            self._turn += 1

    def _fold(self, update: ClientUpdate) -> None:
        client, delta = update.client, update.delta
        factor = self._mixing.factor(client, self._plan, self._federation.participation)
        if self._mixing.remembers:
            last = self._state.remembered.get(client)
            stale = None if last is None else self._memory.recall(client, last)
            kept = self._memory.keep(client, update.round, into_frame(delta, self._gauges[delta.basis]))
            beta, stale_beta = self._own_betas(client, (kept, update.round), (stale, last or 0), factor)
            self._mix.replace(
                kept, stale, factor=factor, weight=self._plan.weight[client],
                beta=beta * self._rates.in_memory(update.round),
                stale_beta=stale_beta * self._rates.in_memory(last or 0),
            )  # fmt: skip
        self._mix.add(delta, factor * self._rates.now(update.round, self._plan.round))
        if self._products is not None:
            self._products.add(delta, factor)
        self._factors += factor
        self._columns.add(client, factor)
        self._heard[client] = update.round
        self._released[client] = _released(update, self._mix.layout, self._federation)
        if update.accuracy is not None:
            self._accuracy[client] = update.accuracy

    def _own_betas(
        self, client: str, kept: tuple[Delta, int], stale: tuple[Delta | None, int], factor: float
    ) -> tuple[float, float]:
        """Of what is remembered of the client from now on, and of what was, with their rounds; 1 where all have one."""
        adaptive = self._mixing.adaptive
        if adaptive is None or self._recurrence is None:
            return 1.0, 1.0
        fresh = self._rates.as_now(*kept, self._plan.round)
        old = None if stale[0] is None else self._rates.as_now(stale[0], stale[1], self._plan.round)
        pair = self._recurrence.add(fresh, old, factor**2)
        if not adaptive.by_client:
            return 1.0, 1.0
        before = self._state.own.get(client, Own())
        self._own[client] = adaptive.own(before, pair, self._state.recurrence)
        return self._own[client].beta, before.beta

    def _known(self) -> Recurrence:
        known, adaptive = self._state.recurrence, self._mixing.adaptive
        if adaptive is None or self._recurrence is None:
            return known
        return adaptive.after(known, self._recurrence.sums())

    def _reject(self, client: str, fault: str) -> None:
        self._rejected.setdefault(client, set()).add(fault)

    def _report(self) -> RoundReport:
        return RoundReport(
            round=self._plan.round,
            asked=self._plan.cohort,
            answered=tuple(sorted(self._heard)),
            refused=_joined(self._refused),
            rejected=_joined(self._rejected),
            accuracy={client: self._accuracy[client] for client in sorted(self._accuracy)},
            released={client: self._released[client] for client in sorted(self._released)},
        )


def _released(update: ClientUpdate, layout: Layout, federation: schema.Federation) -> Released:
    row = layout.flat(update.delta)
    length = float(torch.linalg.vector_norm(row, dtype=torch.float64))
    spent = update.spent[0] if update.spent else None
    numbers = trained_numbers(update, federation)
    return Released(round=update.round, length=length, numbers=numbers, spent=spent)


def _joined(reasons: Mapping[str, set[str]]) -> dict[str, str]:
    return {client: "; ".join(sorted(reasons[client])) for client in sorted(reasons)}
