"""A ledger proved to somebody who trusts nothing but its file: the chain, the replies, and epsilon computed anew."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.config.load import load_node
from fedlora.errors import ConfigError, LedgerError, PrivacyError
from fedlora.privacy.accountants import agreed_epsilon, epsilon
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import ADJACENCY, UNIT, VERSION, Contents, Debit
from fedlora.privacy.ledger_mark import marked, require_reached
from fedlora.privacy.outbox import Outbox
from fedlora.runs.budgets import DEFAULT_DELTA, kind_of, node_ledger
from fedlora.runs.evidence import account_of, require_debits, run_ledgers
from fedlora.runs.promise import is_evaluation
from fedlora.runs.rundir import finished_summary, load_roster, run_config
from fedlora.values import DpEvent


def verified(path: Path, delta: float | None = None) -> list[dict[str, Any]]:
    """One row a ledger, each of which holds; empty where privacy is off.

    `objection` is None where two accountants agree on epsilon, else what is wrong with it.

    Args:
        path: a ledger, a data owner's node.yaml (then also its mark and the replies in its outbox), or the
            directory of a simulation (then also its rounds and its summary).
        delta: of a lone ledger, by default 1e-5; a run and a node have their own.

    Raises:
        ConfigError: no such path, no ledger in it, or a delta where there is one already.
        LedgerError: a ledger is damaged, edited, rolled back or missing, or contradicts what lies beside it.
    """
    match kind_of(path, delta):
        case "run":
            return _of_run(path)
        case "node":
            return [_of_node(path)]
        case _:
            found = read_ledger(path)
            return [_row(path, found, delta=DEFAULT_DELTA if delta is None else delta, accountant="pld")]


def _of_run(run_dir: Path) -> list[dict[str, Any]]:
    config = run_config(run_dir)
    if config.privacy == "none":
        return []
    if load_roster(run_dir) is not None:
        raise ConfigError(
            f"{run_dir} is a server's run and holds no ledger; each data owner proves the own one: "
            "fedlora budget verify node.yaml"
        )
    require_debits(config, run_dir)
    delta, accountant = config.privacy.target_delta, config.privacy.accountant
    rows = [
        _row(path, held, delta=delta, accountant=accountant) for path, held in run_ledgers(run_dir).items()
    ]
    _require_same_as_summary(run_dir, rows)
    return rows


def _require_same_as_summary(run_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    claimed = (finished_summary(run_dir) or {}).get("epsilon_by_client") or {}
    for row in rows:
        claim = claimed.get(row["client"], row["epsilon"])
        if abs(claim - row["epsilon"]) > 1e-6:
            raise LedgerError(
                f"{run_dir / 'summary.json'}: says epsilon {claim} of {row['client']}, its ledger amounts to "
                f"{row['epsilon']}; believe the ledger"
            )


def _of_node(path: Path) -> dict[str, Any]:
    config = load_node(path)
    ledger, outbox = Path(config.ledger), Outbox(Path(f"{config.ledger}.outbox"))
    found = node_ledger(config)
    for seen in (outbox.furthest(), marked(None if config.mark is None else Path(config.mark))):
        require_reached(ledger, found, seen)
    if found is None:
        raise ConfigError(
            f"{ledger}: not there, and no reply beside it: nothing was spent, or all was lost; "
            "if it was, restore a backup"
        )
    row = _row(ledger, found, delta=config.budget.target_delta, accountant=config.budget.accountant)
    return {**row, "replies": _replies(ledger, found, outbox)}


def _replies(ledger: Path, found: Contents, outbox: Outbox) -> dict[str, int]:
    """How many replies are kept, each of which is what its debit's release says; how many of them are unsent; and of
    how many the bytes are gone, since the server has them.

    Raises:
        LedgerError: a reply was changed, is gone without having been sent, or no debit paid for it.
    """
    asked = sorted({(debit.run, debit.round) for debit in found.debits})
    replies = [reply for run, round_ in asked if (reply := outbox.find(run, round_)) is not None]
    unsent = 0
    for reply in replies:
        released = found.released(reply.paid.seq)
        require_reached(ledger, found, reply.paid)
        which = f"{outbox.directory}: the reply of round {reply.round} of run {reply.run!r}"
        if reply.acknowledged and released is None:
            raise LedgerError(
                f"{which} is empty, but debit {reply.paid.seq} released none; restore the reply"
            )
        if not reply.acknowledged and released not in (None, reply.payload):
            raise LedgerError(
                f"{which} is {reply.payload}, debit {reply.paid.seq} released {released}; it was changed since: "
                "restore it, never send it"
            )
        unsent += released is None
    count = len(list(outbox.directory.glob("*.reply")))
    if count != len(replies):
        raise LedgerError(
            f"{outbox.directory}: {count} replies, of which {count - len(replies)} have no "
            f"debit in {ledger}; they were paid elsewhere: look for the ledger that has them"
        )
    acknowledged = sum(reply.acknowledged for reply in replies)
    return {"kept": count - acknowledged, "acknowledged": acknowledged, "unsent": unsent}


def _row(path: Path, found: Contents, *, delta: float, accountant: str) -> dict[str, Any]:
    account = account_of(found)
    try:
        agreed_epsilon(account.events, delta, accountant)
        objection = None
    except PrivacyError as error:
        objection = f"{path}: {error}"
    return {
        "ledger": str(path),
        "format": VERSION,
        "client": found.header.client,
        "dataset": found.header.dataset_fingerprint,
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "noise_source": found.header.noise,
        "entries": len(found.digests) - 1,
        "debits": len(found.debits),
        "releases": len(found.releases),
        "rounds": account.rounds,
        "lost_attempts": len(found.debits) - account.rounds,
        "head": found.head,
        "mechanisms": _mechanisms(found.debits),
        "delta": delta,
        "accountant": accountant,
        "epsilon": epsilon(account.events, delta, accountant),
        **{f"epsilon_{name}": _known(account.events, delta, name) for name in ("pld", "prv", "rdp")},
        "epsilon_replace_one": epsilon(account.events, delta, "pld", "replace-one"),
        "accountants_agree": objection is None,
        "objection": objection,
    }


def _known(events: Sequence[DpEvent], delta: float, accountant: str) -> float | None:
    try:
        return epsilon(events, delta, accountant)
    except PrivacyError:  # this accountant cannot compose them
        return None


def _mechanisms(debits: Sequence[Debit]) -> list[dict[str, Any]]:
    """Each kind of release with the number of its steps over all debits, in the order of first use."""
    steps: Counter[tuple[DpEvent, float | None]] = Counter()
    for debit in debits:
        for event in debit.events:
            norm = None if is_evaluation(event) else debit.max_grad_norm
            steps[replace(event, steps=1), norm] += event.steps
    return [
        {
            "kind": "evaluation" if is_evaluation(event) else "training",
            "steps": count,
            "noise_multiplier": event.noise_multiplier,
            "sample_rate": event.sample_rate,
            "expected_batch": event.expected_batch,
            "max_draw": event.max_draw,
            "max_grad_norm": norm,
        }
        for (event, norm), count in steps.items()
    ]
