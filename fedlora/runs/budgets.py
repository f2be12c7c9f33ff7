"""What is spent and left, by client: of a run, of one ledger, of a data owner's node."""

from pathlib import Path
from typing import Any

from fedlora.config.load import load_node
from fedlora.config.node import NodeConfig
from fedlora.errors import ConfigError, LedgerError
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import read_ledger
from fedlora.privacy.ledger_format import RESTORE, Contents
from fedlora.runs.evidence import Account, account_of, accounts, noise_source, unaccounted
from fedlora.runs.rundir import load_roster, run_config
from fedlora.runs.summary import known_clients

DEFAULT_DELTA = 1e-5
"""Of a lone ledger, which knows none; usual in papers."""


def budgets(path: Path, delta: float | None = None) -> list[dict[str, Any]]:
    """One row a client, all with the same keys; what cannot be known is None. Empty where privacy is off.

    `participations` are debits, so an attempt that left no reply counts. `verified` says that a ledger's chain was
    read and holds; without one there is only a node's word, or nothing spent yet. A client that answered more rounds
    than its ledger has debits of is shown with these rounds, and epsilon None.

    Args:
        path: a run directory, a data owner's node.yaml, or one ledger.
        delta: of a lone ledger, by default 1e-5; a run and a node have their own.

    Raises:
        ConfigError: no such path, or a delta where there is one already.
        LedgerError: a ledger is damaged or edited.
    """
    kind = kind_of(path, delta)
    if kind == "run":
        return _of_run(path)
    if kind == "node":
        return [node_budget(load_node(path))]
    return [_of_ledger(path, DEFAULT_DELTA if delta is None else delta)]


def kind_of(path: Path, delta: float | None) -> str:
    """What `path` is: "run", "node" or "ledger".

    Raises:
        ConfigError: it is not there, or has a delta of its own and another was given.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or directory; name a run directory, a node.yaml or a ledger")
    kind = "run" if path.is_dir() else "node" if path.suffix in (".yaml", ".yml") else "ledger"
    if delta is not None and kind != "ledger":
        raise ConfigError(f"{path} has its own target_delta; leave --delta out, or name one ledger with it")
    if kind == "ledger" and not path.read_bytes().startswith(b"{"):
        named = "name a run directory, a node.yaml or a ledger"
        raise LedgerError(f"{path}: no ledger begins so; {named}; or, if this is one: {RESTORE}")
    return kind


def _of_run(run_dir: Path) -> list[dict[str, Any]]:
    config = run_config(run_dir)
    if config.privacy == "none":
        return []
    # The nodes of a server's run hold to budgets of their own, which it does not know.
    limit = Budget.of(config.privacy) if load_roster(run_dir) is None else None
    held = accounts(run_dir)
    lost, noise = unaccounted(run_dir, held), noise_source(run_dir, held)
    terms: dict[str, Any] = {
        "delta": config.privacy.target_delta,
        "accountant": config.privacy.accountant,
        "limit": limit,
        "noise": noise,
    }
    return [
        _row(client, held.get(client, Account()), lost=lost.get(client, 0), **terms)
        for client in sorted({*known_clients(run_dir, config), *held})
    ]


def node_budget(config: NodeConfig) -> dict[str, Any]:
    """The row of a data owner's node; LedgerError if its ledger is damaged, edited or somebody else's."""
    limit, found = Budget.of(config.budget), node_ledger(config)
    return _row(
        config.client,
        Account() if found is None else account_of(found),
        delta=limit.target_delta,
        accountant=limit.accountant,
        limit=limit,
        noise=found and found.header.noise,
    )


def node_ledger(config: NodeConfig) -> Contents | None:
    """A node's verified ledger; None before its first debit.

    Raises:
        LedgerError: it is damaged, edited or another client's.
    """
    path = Path(config.ledger)
    if not path.exists():
        return None
    found = read_ledger(path)
    if found.header.client != config.client:
        raise LedgerError(
            f"{path}:1: foreign, of client {found.header.client!r}, the node is {config.client!r}; give each client "
            "its own ledger path"
        )
    return found


def _of_ledger(path: Path, delta: float) -> dict[str, Any]:
    found = read_ledger(path)
    return _row(
        found.header.client,
        account_of(found),
        delta=delta,
        accountant="pld",
        limit=None,
        noise=found.header.noise,
    )


def _row(
    client: str,
    account: Account,
    *,
    delta: float,
    accountant: str,
    limit: Budget | None,
    noise: str | None,
    lost: int = 0,
) -> dict[str, Any]:
    """`lost`: rounds answered by a client whose account has fewer; then nobody knows what it spent."""
    spent = None if lost else epsilon(account.events, delta, accountant)
    return {
        "client": client,
        "participations": lost or len(account.debits),
        "max_participations": limit and limit.max_participations,
        "epsilon": spent,
        "target_epsilon": limit and limit.target_epsilon,
        "left": None if limit is None or spent is None else max(0.0, limit.target_epsilon - spent),
        "delta": delta,
        "accountant": accountant,
        "verified": account.by_ledger and not lost,
        "noise_source": noise,
    }
