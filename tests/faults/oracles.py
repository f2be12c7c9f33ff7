"""What must be true of a run whatever happened to it: of the server's directory, and of each node's ledger."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedlora.config.node import NodeConfig
from fedlora.config.schema import RunConfig
from fedlora.deploy.replay import replay
from fedlora.disk import whole_lines
from fedlora.errors import FedLoraError
from fedlora.federation.store import Store, state_digest
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger_format import events_of, parse
from fedlora.runs.rundir import SPENT, finished_summary
from fedlora.runs.summary import run_summary
from fedlora.transport.wire import decode_reply
from fedlora.values import ClientUpdate
from tests.faults.grid import Taped


def is_update(said: Taped) -> bool:
    """It is an update, whole; no hello and no refusal."""
    return bool(said.frame) and isinstance(decode_reply(said.frame), ClientUpdate)


def of_rounds(run_dir: Path, last: int) -> list[str]:
    """What is broken in the directory of a finished run."""
    lines, journal = whole_lines(run_dir / "rounds.jsonl"), whole_lines(run_dir / SPENT)
    found = []
    if (logged := [line["round"] for line in lines]) != list(range(last + 1)):
        found.append(f"rounds.jsonl has rounds {logged}")
    used = Counter[str]()
    for line in lines:
        heard = [entry for entry in journal if entry["heard"] == line["round"]]
        for client in sorted({entry["client"] for entry in heard} | set(line["answered"])):
            own = sorted((entry["round"], entry["payload"]) for entry in heard if entry["client"] == client)
            if client in line["answered"] and own:
                used[own.pop()[1]] += 1  # of several, the newest counts
            elif client in line["answered"]:
                found.append(f"{client} counts in round {line['round']} and is not in the journal")
            if own and client not in line["rejected"]:
                found.append(f"{client}: {own} of round {line['round']} neither count nor are rejected")
    found += [f"update {payload} counts {n} times" for payload, n in used.items() if n > 1]
    if stray := [entry["payload"] for entry in journal if entry["heard"] not in logged]:
        found.append(f"updates {stray} were heard in rounds that never were")
    state, _ = Store(run_dir).load()
    try:
        played = list(replay(run_dir))
    except FedLoraError as error:
        return [*found, f"the journal cannot be played again: {error}"]
    if played[-1:] != [(last, state_digest(state))]:
        found.append(
            f"played again, the journal ends in {played[-1:]}, not in round {last}, {state_digest(state)}"
        )
    leftover = [path.name for path in run_dir.rglob("*.part")]
    return found + [f"{name} was left behind" for name in leftover]


def of_ledger(config: NodeConfig, released: set[bytes]) -> list[str]:
    """What is broken in a node's ledger, given all updates that left the node."""
    path = Path(config.ledger)
    if not path.exists():
        return [f"{config.client} has no ledger, and {len(released)} updates left it"] if released else []
    contents, budget = parse(path.read_bytes(), path.name), Budget.of(config.budget)
    known = {contents.released(debit.seq) for debit in contents.debits}
    unpaid = [frame for frame in released if hashlib.sha256(frame).hexdigest() not in known]
    found = [f"{len(unpaid)} updates left {config.client} that its ledger does not hold"] if unpaid else []
    spent = epsilon(events_of(contents.debits), budget.target_delta, budget.accountant)
    if len(contents.debits) > budget.max_participations or spent > budget.target_epsilon:
        found.append(f"{config.client} paid {len(contents.debits)} times, epsilon {spent}")
    return found


def of_summary(run_dir: Path, config: RunConfig, clients: Sequence[str]) -> list[str]:
    """What is broken in summary.json: it is all told by what lies in the directory.

    An accountant keeps what it told, so that processes forked from here need not count it again.
    """
    state, _ = Store(run_dir).load()
    try:
        told = run_summary(run_dir, config, clients=clients, state=state)
    except FedLoraError as error:
        return [f"no summary can be told: {error}"]
    return [] if told == finished_summary(run_dir) else ["summary.json is not what lies in the directory"]
