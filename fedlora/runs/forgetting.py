"""Clients that withdrew from a run: what is remembered of them is erased, and the run goes on without them.

RUN_DIR/forgotten.json names them, each with whether all of it is erased. The name is there before anything is touched
and a run does not go on while something is left to erase, so a command that was killed has only to be given again.

What runs of an interrupted comparison share lies beside them, in its `.states`, and says as much as their records.
It goes when the comparison is finished, or by hand.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.config.schema import Federation, RunConfig
from fedlora.data import load_corpus
from fedlora.data.partition import client_names, partition
from fedlora.disk import fsync, write_durably
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.plan import weights
from fedlora.federation.rates import Rates
from fedlora.federation.store import Store
from fedlora.methods.mixing import Mixing
from fedlora.runs.own_b import erase_own_b
from fedlora.runs.partition_picture import PARTITION
from fedlora.runs.rundir import (
    HOLDINGS,
    STATES,
    drop_digest_of_records,
    finished_summary,
    load_roster,
    locked,
    run_config,
)
from fedlora.values import Member

MOST_NAMED = 8

Eraser = Callable[[str], int]
"""Erases the updates of a client that lie in one place, safe to kill and to call again; how many there were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """What `forget` did. records: of the memory; updates: what the erasers erased; left: clients that go on."""

    client: str
    already: bool
    records: int
    updates: int
    left: int
    finished: bool


def forgotten(run_dir: Path) -> dict[str, bool]:
    """Who withdrew, and whether all that was to be erased is.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run_dir / "forgotten.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it") from None
    if not isinstance(found, dict) or not all(isinstance(erased, bool) for erased in found.values()):
        raise ConfigError(f"{path} is damaged (not client: true or false); restore it")
    return found


def remaining(run_dir: Path, members: Sequence[Member]) -> tuple[Member, ...]:
    """The members that the run goes on with.

    Raises:
        IncompleteError: somebody is forgotten by half.
    """
    gone = forgotten(run_dir)
    _require_whole(run_dir, gone)
    return tuple(member for member in members if member.client not in gone)


def forget(run_dir: Path, client: str, erasers: Sequence[Eraser]) -> Erased:
    """Nothing of the client is left in memory, checkpoints, stored updates and caches; the model keeps what it learned.

    Its remembered update is subtracted from the running sum, and the shares of all others grow. Given again it changes
    nothing; killed at any moment and given again it ends the same. A finished run is erased likewise, its model stays.

    Args:
        run_dir: of a simulation or of a server.
        client: who withdrew.
        erasers: one for each place where updates of the client may be stored.

    Raises:
        ConfigError: no run, no such client, a process at work on the run, or too few clients would be left.
        IncompleteError: what is remembered of it cannot be read, or another one is forgotten by half.
    """
    config = run_config(run_dir)
    with locked(run_dir):
        gone, finished = forgotten(run_dir), finished_summary(run_dir) is not None
        members = _members(run_dir, config)
        _require_member(run_dir, members, client)
        _require_whole(run_dir, {name: erased for name, erased in gone.items() if name != client})
        left = [member for member in members if member.client not in {*gone, client}]
        already, records, updates = gone.get(client, False), 0, 0
        if not already:
            if not finished:
                _require_enough(left, config.federation, client)
            _save(run_dir, {**gone, client: False})
            before = [member for member in members if member.client == client or member.client not in gone]
            share = weights(before, config.federation.weighting)[client]
            rates = Rates(mixing=Mixing.of(config.method.stale), federation=config.federation)
            store = Store(run_dir, kept=config.method.stale.dtype)
            records = store.forget(client, share, rates.in_memory)
            updates = sum(erase(client) for erase in erasers)
            erase_own_b(run_dir, client)
            _erase_caches(run_dir, client)
            _save(run_dir, {**gone, client: True})
    return Erased(
        client=client, already=already, records=records, updates=updates, left=len(left), finished=finished
    )


def _erase_caches(run_dir: Path, client: str) -> None:
    """Nothing that an interrupted simulation made of the client's records is left."""
    holdings, states = run_dir / HOLDINGS, run_dir / STATES
    if holdings.is_dir():
        shutil.rmtree(holdings)
        fsync(run_dir)
    if states.is_dir():
        for path in states.iterdir():
            if path.name == client or path.name.startswith(f".{client}."):
                path.unlink()
        fsync(states)
    drop_digest_of_records(run_dir)
    if (run_dir / PARTITION).exists():
        (run_dir / PARTITION).unlink()
        fsync(run_dir)


def _members(run_dir: Path, config: RunConfig) -> tuple[Member, ...]:
    """Everybody who ever was a member. A simulation's records are looked at only where something hangs on them."""
    roster = load_roster(run_dir)
    if roster is not None:
        return roster.members
    count = config.data.partition.clients
    if count is not None and config.federation.weighting == "uniform":
        return tuple(Member(client=client, examples=0) for client in client_names(count))
    records = load_corpus(config.data, config.task, config.seed).train
    parts = partition(records, config.data.partition, config.seed)
    return tuple(Member(client=client, examples=len(held)) for client, held in sorted(parts.items()))


def _require_member(run_dir: Path, members: Sequence[Member], client: str) -> None:
    names = [member.client for member in members]
    if client not in names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise ConfigError(f"{client!r} is no client of {run_dir}; they are {names[:MOST_NAMED]}{more}")


def _require_enough(left: Sequence[Member], federation: Federation, client: str) -> None:
    least = federation.cohort if isinstance(federation.cohort, int) else 1
    if len(left) < least:
        raise ConfigError(
            f"without {client!r} {len(left)} clients are left and federation.cohort asks {least} a round; nothing was "
            "changed: let the run finish first, or start another with a smaller cohort and delete this one"
        )


def _require_whole(run_dir: Path, gone: Mapping[str, bool]) -> None:
    for client in (client for client, erased in gone.items() if not erased):
        raise IncompleteError(
            f"{client!r} is forgotten by half; give again: fedlora forget {run_dir} {client}"
        )


def _save(run_dir: Path, gone: Mapping[str, bool]) -> None:
    write_durably(run_dir / "forgotten.json", json.dumps(dict(gone), indent=2) + "\n")
