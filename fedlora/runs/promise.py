"""What a run may claim about privacy, worked out from what was spent: the part of summary.json that ledgers decide."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.config.schema import Privacy
from fedlora.errors import PrivacyError
from fedlora.privacy.accountants import agreed_epsilon, epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import ADJACENCY, UNIT
from fedlora.runs.evidence import Account, account_of, accounts, noise_source
from fedlora.values import DpEvent

log = logging.getLogger(__name__)

KEYS = (
    *(
        "private",
        "epsilon_max",
        "epsilon_by_client",
        "epsilon_replace_one_max",
        "epsilon_replace_one_by_client",
    ),
    *("delta", "accountant", "accountants_agree", "unit", "adjacency", "noise_source"),
    *("debits_by_client", "lost_attempts", "training", "evaluation", "tuning"),
)


def promise(
    privacy: Privacy | str,
    run_dir: Path,
    clients: Sequence[str],
    *,
    finished: bool,
    known: Mapping[str, Account] | None = None,
) -> dict[str, Any]:
    """The keys of summary.json about privacy: figures from ledgers or reports, only delta and tuning from `privacy`.

    Args:
        privacy: of the run's config.
        run_dir: of the run.
        clients: all who take part; without a ledger, a client has spent nothing.
        finished: adds what takes long: the second accountant, replace-one epsilon, the cost of tuning. They are
            None without.
        known: the run's accounts, where they were read just now.

    Raises:
        LedgerError: a ledger is damaged.
        PrivacyError: two accountants disagree about a ledger.
    """
    if not isinstance(privacy, Privacy):
        return {**dict.fromkeys(KEYS), "private": False}
    known = accounts(run_dir) if known is None else known
    held = {**dict.fromkeys(sorted(clients), Account()), **known}
    source = noise_source(run_dir, known)
    events = {client: account.events for client, account in held.items()}
    agree = _agree(held, privacy) if finished else None
    replace_one = _replace_one(events, privacy) if finished else None
    by_ledger = all(account.by_ledger for account in held.values() if account.debits)
    found = {
        **privacy_summary(privacy, events),
        "epsilon_replace_one_max": replace_one and max(replace_one.values(), default=0.0),
        "epsilon_replace_one_by_client": replace_one,
        "accountants_agree": agree,
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "noise_source": source,
        "debits_by_client": {client: len(account.debits) for client, account in held.items()},
        "lost_attempts": sum(len(a.debits) - a.rounds for a in held.values()) if by_ledger else None,
        "training": training(events),
        "evaluation": evaluation(privacy, events),
        "tuning": tuning(privacy, events if finished else None),
    }
    return {key: found[key] for key in KEYS}


def privacy_summary(privacy: Privacy | str, events: Mapping[str, tuple[DpEvent, ...]]) -> dict[str, Any]:
    """What was spent: epsilon of each client at the target delta, recomputed from `events` by one accountant."""
    if not isinstance(privacy, Privacy):
        keys = ("epsilon_max", "epsilon_by_client", "delta", "accountant")
        return {"private": False, **dict.fromkeys(keys)}
    by_client = {
        client: epsilon(held, privacy.target_delta, privacy.accountant) for client, held in events.items()
    }
    return {
        "private": True,
        "epsilon_max": max(by_client.values(), default=0.0),
        "epsilon_by_client": by_client,
        "delta": privacy.target_delta,
        "accountant": privacy.accountant,
    }


class Spending:
    """The largest epsilon by a simulation's ledgers; asked again, only those that were written since are read again.

    For figures along the way. What is claimed at the end comes from every ledger, read and verified anew.
    """

    def __init__(self, privacy: Privacy | str, run_dir: Path) -> None:
        """Nothing is read yet."""
        self._privacy = privacy
        self._ledgers = run_dir / "ledgers"
        self._known: dict[str, tuple[tuple[int, int, int], float]] = {}

    def epsilon_max(self) -> float | None:
        """Of the client that spent most by now; None where privacy is off.

        Raises:
            LedgerError: a ledger that was written since is damaged.
        """
        if not isinstance(self._privacy, Privacy):
            return None
        found: dict[str, tuple[tuple[int, int, int], float]] = {}
        for name, sign in _signs(self._ledgers):
            known = self._known.get(name)
            if known is None or known[0] != sign:
                events = account_of(read_ledger(self._ledgers / name)).events
                known = sign, epsilon(events, self._privacy.target_delta, self._privacy.accountant)
            found[name] = known
        self._known = found
        return max((spent for _, spent in found.values()), default=0.0)


def _signs(ledgers: Path) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Each ledger's name, and what changes with every line that is appended to it."""
    if not ledgers.is_dir():
        return
    with os.scandir(ledgers) as entries:
        for entry in entries:
            if entry.name.endswith(".jsonl"):
                seen = entry.stat()
                yield entry.name, (seen.st_ino, seen.st_size, seen.st_mtime_ns)


def is_evaluation(event: DpEvent) -> bool:
    """Whether the event is a noised mean over all records, which no draw precedes, and not training."""
    return event.expected_batch is None and event.sample_rate == 1.0


def training(events: Mapping[str, tuple[DpEvent, ...]]) -> dict[str, Any] | None:
    """The bounds within which all clients trained: most steps of one, least noise, highest rate; None: nobody did."""
    steps = {c: [event for event in held if not is_evaluation(event)] for c, held in events.items()}
    if not any(steps.values()):
        return None
    every = [event for held in steps.values() for event in held]
    return {
        "steps_max": max(sum(event.steps for event in held) for held in steps.values()),
        "noise_multiplier_min": min(event.noise_multiplier for event in every),
        "sample_rate_max": max(event.sample_rate for event in every),
    }


def evaluation(privacy: Privacy, events: Mapping[str, tuple[DpEvent, ...]]) -> dict[str, Any] | None:
    """What clients told of their own records beside updates, and the largest epsilon had they not; None: nothing."""
    told = {client: [event for event in held if is_evaluation(event)] for client, held in events.items()}
    if not any(told.values()):
        return None
    rest = {c: tuple(event for event in held if not is_evaluation(event)) for c, held in events.items()}
    return {
        "releases_max": max(sum(event.steps for event in held) for held in told.values()),
        "noise_min": min(event.noise_multiplier for held in told.values() for event in held),
        "epsilon_max_without": privacy_summary(privacy, rest)["epsilon_max"],
    }


def tuning(privacy: Privacy, events: Mapping[str, tuple[DpEvent, ...]] | None) -> dict[str, Any]:
    """What was declared about tuning and, for private runs, the largest epsilon of so many runs like this together."""
    declared = privacy.tuned_on
    if isinstance(declared, str):
        return {"tuned_on": declared, "private_runs": None, "epsilon_max": None}
    runs, cost = declared.private_runs, None
    if events is not None:
        each = {
            c: tuple(replace(event, steps=event.steps * runs) for event in held) for c, held in events.items()
        }
        cost = privacy_summary(privacy, each)["epsilon_max"]
    return {"tuned_on": "private runs", "private_runs": runs, "epsilon_max": cost}


def _agree(held: Mapping[str, Account], privacy: Privacy) -> bool:
    """Whether two accountants agree on every client; about a ledger they have to.

    What a node only reports, possibly nonsense, must not keep a server's run from its end: then it is False.
    """
    agree = True
    for client, account in held.items():
        try:
            agreed_epsilon(account.events, privacy.target_delta, privacy.accountant)
        except PrivacyError as error:
            if account.by_ledger:
                raise PrivacyError(f"{client}: {error}") from error
            log.error("%s, by what it reports: %s", client, error)
            agree = False
    return agree


def _replace_one(events: Mapping[str, tuple[DpEvent, ...]], privacy: Privacy) -> dict[str, float]:
    return {
        client: epsilon(held, privacy.target_delta, "pld", "replace-one") for client, held in events.items()
    }
