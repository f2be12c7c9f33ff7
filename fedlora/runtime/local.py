"""The reference runtime: clients one after the other, in this process."""

from collections.abc import Iterator, Mapping, Sequence

from fedlora.data.records import Examples
from fedlora.federation.events import ClientDone, Listener, outcome
from fedlora.runtime.host import Host, HostSetup
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import Reply, TrainRequest


class LocalCohort:
    """A Cohort of one host."""

    def __init__(self, setup: HostSetup, examples: Mapping[str, Examples], listener: Listener) -> None:
        self.host = Host(setup)
        self.examples = examples
        self.listener = listener

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort."""
        frame = encode_request(request)
        for client in clients:
            reply = decode_reply(self.host.answer(client, self.examples[client], frame))
            self.listener(ClientDone(round=request.round, client=client, outcome=outcome(reply)))
            yield reply

    def close(self) -> None:
        """See Cohort."""
