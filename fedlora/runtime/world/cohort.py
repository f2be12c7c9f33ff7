"""A Cohort whose clients come, go and take their time, around one that really works."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.config.schema import Federation
from fedlora.errors import IncompleteError
from fedlora.federation.cohort import Cohort
from fedlora.runs.forgetting import forgotten
from fedlora.runtime.world.clock import Clock
from fedlora.runtime.world.window import Moment, Window, window
from fedlora.runtime.world.world import World
from fedlora.values import Refusal, Reply, TrainRequest

log = logging.getLogger(__name__)


class VirtualCohort:
    """Asks `inner` for whoever the world lets be asked, and hands each reply to the round that it arrives in.

    Who is away is not asked: its records and its ledger stay untouched. Who is asked works, and pays, whether its
    reply comes in time, late or never. Nothing here reads a clock of the machine, and no more than one reply is held
    in memory. A round done again, after any interruption, yields the same. A late reply that no server would count,
    since its client was forgotten or the gauges do not reach back to it, is never heard.
    """

    def __init__(
        self, inner: Cohort, *, world: World, federation: Federation, run_dir: Path, completed: int
    ) -> None:
        """`completed`: rounds that are done. Raises as Clock does."""
        self.inner = inner
        self.world = world
        self.federation = federation
        self.gone = frozenset(forgotten(run_dir))
        self.clock = Clock(run_dir, world.digest, completed)

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """Replies of this round in the order of `clients`, then late ones as they arrived.

        All that the next round has to know is durable before the first of them.
        """
        self.clock.prune(request.round)
        moment = self.clock.moment(request.round)
        gone = [errand for errand in moment.pending if errand.client in self.gone]
        began = replace(moment, pending=tuple(errand for errand in moment.pending if errand not in gone))
        over = self._over(began, clients, request)
        self.clock.advance(request.round, began, over)
        for errand in (*gone, *over.lost, *over.dropped):
            self.clock.forget(errand)
        self._warn_of(over, request)
        for errand in over.fresh:
            reply = self.clock.reply(errand)
            self.clock.forget(errand)
            yield reply
        for errand in over.late:
            yield self.clock.reply(errand)

    def close(self) -> None:
        """See Cohort."""
        self.inner.close()

    def _warn_of(self, over: Window, request: TrainRequest) -> None:
        now, reach = request.adapters.basis, self.federation.keep_gauges
        for errand in over.dropped:
            log.warning(
                "round %d: the reply of %s to round %d counts no more: trained in basis %d, gauges reach back to %d "
                "(now %d); raise federation.keep_gauges or lower federation.deadline_s",
                request.round, errand.client, errand.round, errand.basis, now - reach, now,
            )  # fmt: skip

    def _over(self, began: Moment, clients: Sequence[str], request: TrainRequest) -> Window:
        numbers = {client: number for number, client in enumerate(clients)}

        def ask(there: Sequence[str]) -> set[str]:
            refused: set[str] = set()
            waiting = set(there)
            for reply in self.inner.ask(there, request):
                if reply.client not in waiting or reply.round != request.round:
                    continue  # a second reply to the same question
                waiting.remove(reply.client)
                self.clock.keep(reply, numbers[reply.client])
                if isinstance(reply, Refusal):
                    refused.add(reply.client)
            if waiting:
                raise IncompleteError(
                    f"round {request.round}: {sorted(waiting)[:3]} gave no reply and no reason; resume the run"
                )
            return refused

        return window(
            began,
            clients,
            request.round,
            basis=request.adapters.basis,
            world=self.world,
            federation=self.federation,
            ask=ask,
        )
