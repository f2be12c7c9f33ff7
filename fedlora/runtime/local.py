"""The reference runtime: clients one after the other, or group after group, in this process."""

from collections.abc import Iterator, Sequence

from fedlora.federation.events import ClientDone, Listener, outcome
from fedlora.runtime.host import Host, HostSetup
from fedlora.training.model import AdaptedModel
from fedlora.values import Reply, TrainRequest


class LocalCohort:
    """A Cohort of one host."""

    def __init__(self, setup: HostSetup, listener: Listener, model: AdaptedModel | None = None) -> None:
        """model: the server's, which rests while clients train; None: they have their own, as on a GPU."""
        self.host = Host(setup, model if setup.config.runtime.device == "cpu" else None)
        self.listener = listener

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort."""
        size = self.host.setup.together
        for start in range(0, len(clients), size):
            for reply in self.host.answer(clients[start : start + size], request):
                self.listener(ClientDone(round=request.round, client=reply.client, outcome=outcome(reply)))
                yield reply

    def close(self) -> None:
        """See Cohort."""
