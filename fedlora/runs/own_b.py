"""The simulated clients' own B's, in the directory of a run whose method leaves each its own."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from fedlora.config.load import run_name
from fedlora.disk import fsync
from fedlora.errors import ConfigError
from fedlora.federation.store import Store
from fedlora.runs.rundir import PERSONAL, load_roster, run_config, run_rounds
from fedlora.training.personal import Personal
from fedlora.values import Adapters


def personal(run_dir: Path, client: str) -> Personal:
    """Where the client keeps its own."""
    return Personal(run_dir / PERSONAL / client)


def own_adapters(run_dir: Path, client: str) -> Adapters:
    """The run's newest A and head with the client's own B, as it was when that round ended.

    Raises:
        ConfigError: the run leaves no client a B of its own, or not here, or this one has none; or it is damaged.
    """
    config = run_config(run_dir)
    if not config.method.own_b:
        raise ConfigError(
            f"{run_dir}: clients of {config.method.name} have no B of their own; leave --client out"
        )
    if load_roster(run_dir) is not None:
        raise ConfigError(
            f"{run_dir} is a server's run, whose nodes keep their own B's; leave --client out, and see docs/methods.md"
        )
    state, _ = Store(run_dir).load()
    own = personal(run_dir, client).own(run_name(config), state.round + 1)
    if own is None:
        kept = with_own_b(run_dir)[:8]
        raise ConfigError(f"{client!r} has no B of its own in {run_dir}; those who have are {kept}")
    return own.in_place_of(state.adapters)


def with_own_b(run_dir: Path) -> list[str]:
    """The clients whose B was kept, whatever else lies there."""
    run, state = run_name(run_config(run_dir)), Store(run_dir).load()[0]
    names = (path.name for path in (run_dir / PERSONAL).glob("*"))
    return sorted(name for name in names if personal(run_dir, name).newest(run, state.round + 1))


def require_own_b(run_dir: Path, clients: Iterable[str]) -> None:
    """Passes a run whose clients still have the B that the last round which they answered left them.

    Raises:
        ConfigError: one has not; to go on from an older one, or from zero, would be another run.
    """
    run = run_name(run_config(run_dir))
    last = {client: line["round"] for line in run_rounds(run_dir) for client in line["answered"]}
    for client in sorted(last.keys() & set(clients)):
        personal(run_dir, client).require(run, last[client] + 1, last[client])


def erase_own_b(run_dir: Path, client: str) -> None:
    """The client has none any more."""
    if (directory := run_dir / PERSONAL / client).is_dir():
        shutil.rmtree(directory)
        fsync(directory.parent)
