"""Where remembered updates lie: what a round asks of it, and a place in this process. memory.py has one on disk."""

from collections.abc import Mapping
from typing import Protocol

from fedlora.errors import IncompleteError
from fedlora.values import Delta


class Memory(Protocol):
    """Where remembered updates lie, in the frame. Laws: what `keep` returned is what `recall` returns."""

    def recall(self, client: str, at: int) -> Delta:
        """What was kept of the client's update of round `at`; IncompleteError if it is gone."""
        ...

    def keep(self, client: str, at: int, update: Delta) -> Delta:
        """Durable once the round is; the round's crash leaves what was kept before it."""
        ...


class Remembered:
    """A Memory in this process, for federations of a few clients."""

    def __init__(self, updates: Mapping[str, tuple[int, Delta]] | None = None) -> None:
        """It begins with `updates`, by client with their rounds, which it does not change."""
        self.updates = dict(updates or {})

    def recall(self, client: str, at: int) -> Delta:
        """See Memory."""
        kept, update = self.updates.get(client, (None, None))
        if update is None or kept != at:  # taking it for zero would count its share of the memory for ever
            raise IncompleteError(
                f"the update of {client!r} remembered from round {at} is missing; restore it"
            )
        return update

    def keep(self, client: str, at: int, update: Delta) -> Delta:
        """See Memory."""
        self.updates[client] = at, update
        return update
