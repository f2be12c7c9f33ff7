"""What nodes say they spent, as a server keeps it: spent.jsonl. Each node's own ledger is the authority."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlora.federation.cohort import Cohort
from fedlora.federation.store import append_durably, whole_lines
from fedlora.values import ClientUpdate, DpEvent, Member, Refusal, RefusalReason, Reply, TrainRequest

log = logging.getLogger(__name__)


class Reported:
    """A Cohort whose updates' spent events are in a journal before anybody uses the update."""

    def __init__(self, cohort: Cohort, journal: Path) -> None:
        self.cohort = cohort
        self.journal = journal

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort. An update whose account of itself makes no sense counts as failed."""
        for reply in self.cohort.ask(clients, request):
            if isinstance(reply, Refusal):
                yield reply
            elif reply.spent is None or not _sound(reply.spent):
                log.error("%s says it spent %s; its update is dropped", reply.client, reply.spent)
                failed = RefusalReason.FAILED
                yield Refusal(client=reply.client, run=reply.run, round=reply.round, reason=failed)
            else:
                self._write(reply, reply.spent)
                yield reply

    def close(self) -> None:
        """See Cohort."""
        self.cohort.close()

    def _write(self, update: ClientUpdate, spent: DpEvent) -> None:
        event = [spent.noise_multiplier, spent.sample_rate, spent.steps]
        append_durably(
            self.journal, json.dumps({"client": update.client, "round": update.round, "spent": event}) + "\n"
        )


def _sound(event: DpEvent) -> bool:
    return 0 < event.noise_multiplier < math.inf and 0 < event.sample_rate <= 1 and event.steps >= 1


def reported_events(journal: Path, members: Sequence[Member]) -> dict[str, tuple[DpEvent, ...]]:
    """What each member said it spent, one event a round however often the reply came."""
    found: dict[tuple[str, int], DpEvent] = {}
    for words in whole_lines(journal):  # the update of a torn line was not used and will be sent again
        noise, rate, steps = words["spent"]
        event = DpEvent(noise_multiplier=noise, sample_rate=rate, steps=steps)
        found[words["client"], words["round"]] = event
    return {
        member.client: tuple(event for (client, _), event in sorted(found.items()) if client == member.client)
        for member in members
    }
