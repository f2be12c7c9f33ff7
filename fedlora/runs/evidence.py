"""What is known of what each client spent: by the ledgers of a simulation, by the nodes' own word elsewhere."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fedlora.config.schema import RunConfig
from fedlora.disk import whole_lines
from fedlora.errors import LedgerError
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import Contents
from fedlora.privacy.noise import BY_THE_NODES, SEEDED
from fedlora.runs.rundir import SPENT, load_roster, run_rounds
from fedlora.transport.wire import event_of
from fedlora.values import DpEvent, Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One client's participations.

    debits: the events of each, oldest first; an attempt that left no reply is one too.
    rounds: how many rounds they were for, at most as many.
    by_ledger: whether a verified ledger says so; else it is the node's word.
    noise: the kind of noise that the ledger names; None without one.
    """

    debits: tuple[tuple[DpEvent, ...], ...] = ()
    rounds: int = 0
    by_ledger: bool = False
    noise: str | None = None

    @property
    def events(self) -> tuple[DpEvent, ...]:
        """All that was spent."""
        return tuple(chain.from_iterable(self.debits))


def accounts(run_dir: Path) -> dict[str, Account]:
    """Client -> its account. Of a simulation, those that have a ledger; of a server's run, everybody.

    Raises:
        LedgerError: a ledger is damaged or edited.
    """
    roster = load_roster(run_dir)
    if roster is not None:
        return reported(run_dir / SPENT, roster.members)
    return {ledger.header.client: account_of(ledger) for ledger in run_ledgers(run_dir).values()}


def account_of(ledger: Contents) -> Account:
    """What a ledger says."""
    rounds = {(debit.run, debit.round) for debit in ledger.debits}
    debits = tuple(debit.events for debit in ledger.debits)
    return Account(debits=debits, rounds=len(rounds), by_ledger=True, noise=ledger.header.noise)


def run_ledgers(run_dir: Path) -> dict[Path, Contents]:
    """The verified ledgers of a simulation, by their paths in sorted order; LedgerError if one does not hold."""
    return {path: read_ledger(path) for path in sorted((run_dir / "ledgers").glob("*.jsonl"))}


def unaccounted(run_dir: Path, known: Mapping[str, Account]) -> dict[str, int]:
    """Client -> rounds that it answered, where its account has fewer, so that nobody knows what it spent."""
    answered = Counter(client for line in run_rounds(run_dir) for client in line["answered"])
    return {
        client: count
        for client, count in sorted(answered.items())
        if known.get(client, Account()).rounds < count
    }


def require_debits(config: RunConfig, run_dir: Path) -> dict[str, Account]:
    """The accounts of a run in which every update that counted was paid for: in a ledger, or as its node said.

    Empty where privacy is off.

    Raises:
        LedgerError: a ledger, or the journal of what nodes said, is gone or shorter than the rounds answered.
    """
    if config.privacy == "none":
        return {}
    held = accounts(run_dir)
    source = run_dir / ("ledgers" if load_roster(run_dir) is None else SPENT)
    for client, answered in unaccounted(run_dir, held).items():
        raise LedgerError(
            f"{source}: {client} answered {answered} rounds, but debits are there of "
            f"{held.get(client, Account()).rounds}; restore it, since what was spent is no longer known"
        )
    return held


def noise_source(run_dir: Path, held: Mapping[str, Account]) -> str:
    """The kind of noise that the ledgers of a simulation name, by its accounts; what a server knows of it."""
    if load_roster(run_dir) is not None:
        return BY_THE_NODES
    kinds = {account.noise for account in held.values()} - {None}
    # No ledger yet, or several kinds: then the weakest, since seeded noise is all that a simulation draws.
    return (kinds.pop() if len(kinds) == 1 else None) or SEEDED


def reported(journal: Path, members: Sequence[Member]) -> dict[str, Account]:
    """What each member said it spent, once a round however often the reply came."""
    told: dict[str, dict[int, tuple[DpEvent, ...]]] = {member.client: {} for member in members}
    for words in whole_lines(journal):  # the update of a torn line was not used and will be sent again
        events = tuple(event_of(event) for event in words["spent"])
        told.setdefault(words["client"], {})[words["round"]] = events
    return {
        client: Account(debits=tuple(by_round[key] for key in sorted(by_round)), rounds=len(by_round))
        for client, by_round in told.items()
    }
