"""Where clients are, seen from the server."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from fedlora.values import Reply, TrainRequest


class Cohort(Protocol):
    """Somewhere clients can be asked: this process, Ray actors, Flower nodes.

    Laws, tested for each: every reply carries the client that gave it, and no client replies twice to one request;
    a client that fails is a Refusal, never an exception; the order of replies changes no state; the same request again
    gives the same reply. Replies in the order of `clients` need the least memory, see `gather`.
    """

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterable[Reply]:
        """Replies of this round as they come in, and late ones of earlier rounds; ends at the deadline."""
        ...

    def close(self) -> None:
        """Workers are gone."""
        ...
