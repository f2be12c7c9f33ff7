"""What is spent and what is left: of the clients of a run, of one ledger, of a data owner's node."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.config.load import load_node
from fedlora.errors import ConfigError
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import events_of
from fedlora.runtime.rundir import load_roster, run_config
from fedlora.runtime.summary import known_clients, spent_events
from fedlora.values import DpEvent

DEFAULT_DELTA = 1e-5
"""Of a lone ledger, which knows none; usual in papers."""


def budgets(path: Path, delta: float | None = None) -> list[dict[str, Any]]:
    """One row a client, all with the same keys; what cannot be known is None. Empty where privacy is off.

    `verified` says that a ledger's chain was read and holds; without one there is only a node's word, or
    nothing spent yet.

    Args:
        path: a run directory, a data owner's node.yaml, or one ledger.
        delta: of a lone ledger, by default 1e-5; a run and a node have their own.

    Raises:
        ConfigError: no such path, or a delta where there is one already.
        LedgerError: a ledger is damaged or edited.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or directory; name a run directory, a node.yaml or a ledger")
    is_node = path.suffix in (".yaml", ".yml")
    if delta is not None and (is_node or path.is_dir()):
        raise ConfigError(f"{path} has its own target_delta; leave --delta out, or name one ledger with it")
    if path.is_dir():
        return _of_run(path)
    return [_of_node(path) if is_node else _of_ledger(path, DEFAULT_DELTA if delta is None else delta)]


def _of_run(run_dir: Path) -> list[dict[str, Any]]:
    config = run_config(run_dir)
    if config.privacy == "none":
        return []
    # The nodes of a server's run hold to budgets of their own, which it does not know.
    limit = Budget.of(config.privacy) if load_roster(run_dir) is None else None
    spent = spent_events(run_dir)
    delta, accountant = config.privacy.target_delta, config.privacy.accountant
    return [
        _row(
            client,
            spent.get(client, ()),
            delta=delta,
            accountant=accountant,
            limit=limit,
            verified=limit is not None and client in spent,
        )
        for client in sorted({*known_clients(run_dir, config), *spent})
    ]


def _of_node(path: Path) -> dict[str, Any]:
    config = load_node(path)
    limit, ledger = Budget.of(config.budget), Path(config.ledger)
    began = ledger.exists()
    return _row(
        config.client,
        events_of(read_ledger(ledger).entries) if began else (),
        delta=limit.target_delta,
        accountant=limit.accountant,
        limit=limit,
        verified=began,
    )


def _of_ledger(path: Path, delta: float) -> dict[str, Any]:
    ledger = read_ledger(path)
    events = events_of(ledger.entries)
    return _row(ledger.header.client, events, delta=delta, accountant="pld", limit=None, verified=True)


def _row(
    client: str,
    events: Sequence[DpEvent],
    *,
    delta: float,
    accountant: str,
    limit: Budget | None,
    verified: bool,
) -> dict[str, Any]:
    spent = epsilon(events, delta, accountant)
    return {
        "client": client,
        "participations": len(events),
        "max_participations": limit and limit.max_participations,
        "epsilon": spent,
        "target_epsilon": limit and limit.target_epsilon,
        "left": limit and max(0.0, limit.target_epsilon - spent),
        "delta": delta,
        "accountant": accountant,
        "verified": verified,
    }
