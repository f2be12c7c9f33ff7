"""What nodes say they spent, as a server keeps it: spent.jsonl. Each node's own ledger is the authority."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlora.federation.cohort import Cohort
from fedlora.federation.store import append_durably, whole_lines
from fedlora.values import ClientUpdate, DpEvent, Member, Refusal, RefusalReason, Reply, TrainRequest

log = logging.getLogger(__name__)

LEAST_NOISE, MOST_NOISE, MOST_STEPS = 1e-2, 1e4, 1 << 20
"""An event outside is no participation, and one at the end of the run could stop the accountants."""


class Reported:
    """A Cohort whose updates' spent events are in a journal before anybody uses the update."""

    def __init__(self, cohort: Cohort, journal: Path, *, most_steps: int = MOST_STEPS) -> None:
        """Drops what claims more than `most_steps` steps in a round: give what is asked of a node."""
        self.cohort = cohort
        self.journal = journal
        self.most_steps = most_steps

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort. An update whose account of itself makes no sense counts as failed."""
        for reply in self.cohort.ask(clients, request):
            if isinstance(reply, Refusal):
                yield reply
            elif reply.spent is None or not _sound(reply.spent, self.most_steps):
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
        _cut_torn_line(self.journal)
        append_durably(
            self.journal, json.dumps({"client": update.client, "round": update.round, "spent": event}) + "\n"
        )


def _sound(event: DpEvent, most_steps: int) -> bool:
    return (
        LEAST_NOISE <= event.noise_multiplier <= MOST_NOISE
        and 0 < event.sample_rate <= 1
        and 1 <= event.steps <= most_steps
    )


def _cut_torn_line(journal: Path) -> None:
    """A last line that a crash left without its newline goes, or the next one would be written onto it."""
    text = journal.read_bytes() if journal.exists() else b""
    if text and not text.endswith(b"\n"):
        os.truncate(journal, text.rfind(b"\n") + 1)


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
