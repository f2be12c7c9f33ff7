"""A Cohort whose clients come, go and take their time, around one that really works."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlora.config.schema import Federation
from fedlora.errors import IncompleteError
from fedlora.federation.cohort import Cohort
from fedlora.runtime.world.clock import Clock
from fedlora.runtime.world.window import Moment, Window, window
from fedlora.runtime.world.world import World
from fedlora.values import Refusal, Reply, TrainRequest


class VirtualCohort:
    """Asks `inner` for whoever the world lets be asked, and hands each reply to the round that it arrives in.

    Who is away is not asked: its records and its ledger stay untouched. Who is asked works, and pays, whether its
    reply comes in time, late or never. Nothing here reads a clock of the machine, and no more than one reply is held
    in memory. A round done again, after any interruption, yields the same.
    """

    def __init__(
        self, inner: Cohort, *, world: World, federation: Federation, run_dir: Path, completed: int
    ) -> None:
        """`completed`: rounds that are done. Raises as Clock does."""
        self.inner = inner
        self.world = world
        self.federation = federation
        self.clock = Clock(run_dir, world.digest, completed)

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """Replies of this round in the order of `clients`, then late ones as they arrived.

        All that the next round has to know is durable before the first of them.
        """
        self.clock.prune(request.round)
        began = self.clock.moment(request.round)
        over = self._over(began, clients, request)
        self.clock.advance(request.round, began, over)
        for errand in over.lost:
            self.clock.forget(errand)
        for errand in over.fresh:
            reply = self.clock.reply(errand)
            self.clock.forget(errand)
            yield reply
        for errand in over.late:
            yield self.clock.reply(errand)

    def close(self) -> None:
        """See Cohort."""
        self.inner.close()

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

        return window(began, clients, request.round, world=self.world, federation=self.federation, ask=ask)
