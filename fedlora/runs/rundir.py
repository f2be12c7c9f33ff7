"""What lies in a run directory, read without starting anything."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.load import load_config
from fedlora.config.schema import RunConfig
from fedlora.disk import whole_lines, write_durably
from fedlora.errors import ConfigError
from fedlora.federation.store import Store
from fedlora.values import Adapters, Member

SPENT = "spent.jsonl"
"""What nodes said they spent, in a server's run."""
DIAGNOSTICS = "diagnostics.json"
"""What the final adapter is."""
BEGAN_FROM = "began_from.json"
"""Which adapter the run began from: its name, and SHA-256 of its weights file and of all its files."""
SAMPLES = "samples.jsonl"
"""What the model says to public prompts, before and after."""
HOLDINGS = ".holdings"
"""The clients' tokenised records, while a simulation is at work; going on with it writes them anew."""
PERSONAL = "personal"
"""The simulated clients' own B's, a folder a client, where the method leaves each its own."""
STATES = ".states"
"""What frozen layers make of a client's records, a file a client: `NAME`, or `.NAME.*` while it is written."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """No other process works on this run meanwhile."""
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir} is being worked on by another process; follow it with: fedlora status {run_dir}"
            ) from None
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who takes part in a server's run, decided once. run: a name no other run has, since ledgers go by it."""

    run: str
    members: tuple[Member, ...]


def load_roster(run_dir: Path) -> Roster | None:
    """Who takes part in a server's run; None for a simulation, which has no such file."""
    path = run_dir / "roster.json"
    if not path.exists():
        return None
    words = _words(path, "members", "restore it")
    members = tuple(Member(client=client, examples=records) for client, records in words["members"].items())
    return Roster(run=words["run"], members=members)


def save_roster(run_dir: Path, roster: Roster) -> None:
    """The roster is durable; from now on the directory is a server's."""
    members = {member.client: member.examples for member in roster.members}
    words = {"run": roster.run, "members": members}
    write_durably(run_dir / "roster.json", json.dumps(words, indent=2) + "\n")


def require_simulation(run_dir: Path) -> None:
    """Refuses a server's run: its members are real, and nobody may be simulated in their names."""
    if load_roster(run_dir) is not None:
        raise ConfigError(f"{run_dir} is a server's run: {going_on(run_dir)}")


def going_on(run_dir: Path) -> str:
    """What to do so that an interrupted run goes on."""
    if load_roster(run_dir) is not None:
        return "give the same `fedlora serve` command again"
    return f"go on with: fedlora resume {run_dir}"


def run_config(run_dir: Path) -> RunConfig:
    """The config of the run, as resolved when it began.

    Raises:
        ConfigError: the directory holds no run.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{run_dir} holds no run: {path.name} is missing; start one with fedlora simulate")
    return load_config(path, [])


def finished_summary(run_dir: Path) -> dict[str, Any] | None:
    """summary.json of a finished run, or None.

    Raises:
        ConfigError: it is damaged.
    """
    path = run_dir / "summary.json"
    mend = f"restore it, or remove it and {going_on(run_dir)}"
    return _words(path, "rounds_completed", mend) if path.exists() else None


def run_rounds(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl so far; line 0 is the zero-step model. A line still being written is left out."""
    run_config(run_dir)
    path = run_dir / "rounds.jsonl"
    try:
        lines = whole_lines(path)
    except ValueError as error:  # no JSON, no UTF-8
        raise ConfigError(f"{path} is damaged ({_first(error)}); {_LOG_MEND}") from None
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or "round" not in line:
            raise ConfigError(f"{path}:{number} is damaged: it is no round; {_LOG_MEND}")
    return lines


def adapters_of(run_dir: Path) -> tuple[Adapters, tuple[str, ...]]:
    """The newest adapters and the class names of a run."""
    run_config(run_dir)
    state, _ = Store(run_dir).load()
    path = run_dir / "classes.json"
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({_first(error)}); restore it") from None
    return state.adapters, tuple(classes)


def run_diagnostics(run_dir: Path) -> dict[str, Any] | None:
    """diagnostics.json, what was measured of the adapter when the run was delivered; None where nothing was.

    Raises:
        ConfigError: it is damaged.
    """
    path = run_dir / DIAGNOSTICS
    return _words(path, "sites", "restore it, or remove it") if path.exists() else None


def began_from(run_dir: Path) -> dict[str, Any] | None:
    """Which adapter the run began from; None: from none.

    Raises:
        ConfigError: the file that says so is damaged.
    """
    path = run_dir / BEGAN_FROM
    return _words(path, "sha256", "restore it") if path.exists() else None


def run_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The lines {prompt, before, after} of samples.jsonl; none where the run was asked for none.

    Raises:
        ConfigError: it is damaged.
    """
    path = run_dir / SAMPLES
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:  # no JSON, no UTF-8
        raise ConfigError(f"{path} is damaged ({_first(error)}); remove it, or restore it") from None
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not {"prompt", "before", "after"} <= line.keys():
            raise ConfigError(f"{path}:{number} is damaged: it is no sample; remove it, or restore it")
    return lines


_LOG_MEND = "restore it, or remove what follows the last whole line"


def _words(path: Path, key: str, mend: str) -> dict[str, Any]:
    """A JSON object that has `key`, as everything that fedlora wrote there does."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, no UTF-8
        raise ConfigError(f"{path} is damaged ({_first(error)}); {mend}") from None
    if not isinstance(words, dict) or key not in words:
        raise ConfigError(f"{path} is damaged (no {key!r} in it); {mend}")
    return words


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
