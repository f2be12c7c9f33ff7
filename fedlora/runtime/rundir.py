"""What lies in a run directory, read without starting anything."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.config.load import load_config
from fedlora.config.schema import RunConfig
from fedlora.errors import ConfigError
from fedlora.federation.store import Store
from fedlora.values import Adapters


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
    """summary.json of a finished run, or None."""
    path = run_dir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_rounds(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl so far; line 0 is the zero-step model. A line still being written is left out."""
    run_config(run_dir)
    path = run_dir / "rounds.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def adapters_of(run_dir: Path) -> tuple[RunConfig, Adapters, tuple[str, ...]]:
    """The config, the newest adapters and the class names of a run."""
    config = run_config(run_dir)
    state, _ = Store(run_dir).load()
    classes = json.loads((run_dir / "classes.json").read_text())
    return config, state.adapters, tuple(classes)
