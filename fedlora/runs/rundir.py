"""What lies in a run directory, read without starting anything, and without torch."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedlora.config.load import load_config, require_same
from fedlora.config.schema import RunConfig
from fedlora.disk import try_lock, whole_lines, write_durably
from fedlora.errors import ConfigError
from fedlora.federation.absences import MISSED
from fedlora.runs.partition_picture import PARTITION
from fedlora.values import Member

SPENT = "spent.jsonl"
"""What nodes said they spent, in a server's run."""
DIAGNOSTICS = "diagnostics.json"
"""What the final adapter is."""
BEGAN_FROM = "began_from.json"
"""Which adapter the run began from: its name, and SHA-256 of its weights file and of all its files."""
INPUTS = "inputs.json"
"""SHA-256 of what the run reads and does not keep: base model, test records and, of a simulation that is not finished,
the clients' own."""
SAMPLES = "samples.jsonl"
"""What the model says to public prompts, before and after."""
NEWEST = ("round", "asked", "answered", "refused", "rejected")
"""What is told of the newest round."""
HOLDINGS = ".holdings"
"""The clients' tokenised records, while a simulation is at work; going on with it writes them anew."""
PERSONAL = "personal"
"""The simulated clients' own B's, a folder a client, where the method leaves each its own."""
STATES = ".states"
"""What frozen layers make of a client's records, a file a client: `NAME`, or `.NAME.*` while it is written."""

_CLASSES = "classes.json"
_OF_A_START = (_CLASSES, PARTITION)
"""What a run writes before config.yaml makes it one."""


GLANCE_S = 0.5
"""Seconds that a lock may be held by who only asks whether it is."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """No other process works on this run meanwhile."""
    with (run_dir / ".lock").open("w") as file:
        if not taken(file):
            raise ConfigError(
                f"{run_dir} is being worked on by another process; follow it with: fedlora status {run_dir}"
            )
        yield


def require_server_dir(run_dir: Path, config: RunConfig) -> None:
    """`run_dir` is new, or holds a server's run of this very config.

    Raises:
        ConfigError: it holds a simulation, or another run.
    """
    if (run_dir / "config.yaml").exists():
        if load_roster(run_dir) is None:
            raise ConfigError(f"output: {run_dir} holds a simulation; choose another output")
        require_same(run_config(run_dir), config, run_dir)


def taken(file: IO[str]) -> bool:
    """Whether the lock on the file is this process's from here on, until it is closed; waits out a glance."""
    ends = time.monotonic() + GLANCE_S
    while not try_lock(file):
        if time.monotonic() > ends:
            return False
        time.sleep(GLANCE_S / 20)
    return True


def is_at_work(run_dir: Path) -> bool:
    """Whether a process works on this run, or `fedlora serve` sees to it that one will. Writes nothing."""
    return any(_is_held(run_dir / name) for name in (".lock", ".serve.lock"))


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open() as file:
        return not try_lock(file, shared=True)  # let go of at once, with the file


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


def load_classes(run_dir: Path) -> tuple[str, ...]:
    """The names of the run's classes, in order; none where its task has none.

    Raises:
        ConfigError: the file that says so is damaged or gone.
    """
    path = run_dir / _CLASSES
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; restore it") from None
    except ValueError as error:  # no JSON, no UTF-8
        raise ConfigError(f"{path} is damaged ({_first(error)}); restore it") from None


def save_classes(run_dir: Path, classes: Sequence[str]) -> None:
    """The names are durable."""
    write_durably(run_dir / _CLASSES, json.dumps(classes) + "\n")


def restore_classes(run_dir: Path, classes: Sequence[str]) -> None:
    """The names are there again, where the file was lost."""
    if not (run_dir / _CLASSES).exists():
        save_classes(run_dir, classes)


def require_simulation(run_dir: Path) -> None:
    """Refuses a server's run: its members are real, and nobody may be simulated in their names."""
    if load_roster(run_dir) is not None:
        raise ConfigError(f"{run_dir} is a server's run: {going_on(run_dir)}")


def going_on(run_dir: Path) -> str:
    """What to do so that an interrupted run goes on."""
    if load_roster(run_dir) is not None:
        return "give the same `fedlora serve` command again"
    return f"go on with: fedlora resume {run_dir}"


def require_ours(run_dir: Path) -> None:
    """Passes a directory in which a run can begin: it is not there, or holds what a start that was killed leaves.

    Raises:
        ConfigError: it holds files that are no run's.
    """
    present = sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else []
    if foreign := [name for name in present if not name.startswith(".") and name not in _OF_A_START]:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise ConfigError(
            f"{run_dir} holds files that are no run's ({shown}) and is left alone; choose another --run-dir or output"
        )


def run_config(run_dir: Path) -> RunConfig:
    """The config of the run, as resolved when it began.

    Raises:
        ConfigError: the directory holds no run.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        why = f"{path.name} is missing" if run_dir.exists() else "there is no such directory"
        raise ConfigError(
            f"{run_dir} holds no run: {why}; name the directory that one was kept in (its `output`), or start one with "
            "fedlora simulate"
        )
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


def newest_round(run_dir: Path, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Who was asked and who stayed away in the last round that was done, or, after it, begun in vain; None before any.

    Raises:
        ConfigError: what tells of the latter is damaged.
    """
    if not lines:
        return None
    path = run_dir / MISSED
    missed = _words(path, "round", "remove it") if path.exists() else None
    newest = missed if missed is not None and missed["round"] > lines[-1]["round"] else lines[-1]
    return {name: newest[name] for name in NEWEST} if newest["round"] else None


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


def run_inputs(run_dir: Path) -> dict[str, Any] | None:
    """What the run read when it began; None where an older fedlora began it.

    Raises:
        ConfigError: the file that says so is damaged.
    """
    path = run_dir / INPUTS
    return _words(path, "base_model", "restore it") if path.exists() else None


def drop_digest_of_records(run_dir: Path) -> None:
    """`inputs.json` says nothing more of clients' records: who knows all but one could test a guess at it."""
    known = run_inputs(run_dir)
    if known is not None and known.pop("train", None) is not None:
        write_durably(run_dir / INPUTS, json.dumps(known, indent=2) + "\n")


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
