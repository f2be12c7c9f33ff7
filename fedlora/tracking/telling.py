"""A run told to trackers while it goes on: each in a thread of its own, so that none holds the run up or stops it.

RUN_DIR/tracking/NAME.json remembers a tracker's run and the last round it was told, so that a run which is resumed goes
on where it was, with what it missed, and no round is told twice.
"""

import importlib.util
import json
import logging
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.config.schema import RunConfig
from fedlora.disk import make_directory, write_durably
from fedlora.errors import ConfigError, IncompleteError
from fedlora.federation.events import Event, Listener, RoundDone, RunDone, RunStarted
from fedlora.runs.rundir import run_rounds
from fedlora.tracking.figures import figures, told_config, told_summary
from fedlora.tracking.tracker import Open, Opened, Tracked, Tracker

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""For all trackers together to take what is left at the end of a run."""
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""What has to be installed for each, which is also the name of the extra that brings it."""


def require_trackers(names: Sequence[str]) -> None:
    """Passes trackers that are installed.

    Raises:
        ConfigError: a package is missing; says how to get it.
    """
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"tracking: {name} is not installed here; pip install 'fedlora[{name}]', or leave it out of the list"
            )


@contextmanager
def tracked(config: RunConfig, run_dir: Path, listener: Listener) -> Iterator[Listener]:
    """A listener that passes everything on, and tells the config's trackers of rounds and of the end.

    jsonl is none of them: rounds.jsonl is always written, by whoever commits a round.
    """
    told = [Telling(name, run_dir, config) for name in config.tracking if name in PACKAGES]

    def tell(event: Event) -> None:
        listener(event)
        for one in told:
            one(event)

    try:
        yield tell
    finally:
        for one in told:
            one.hang_up()
        until = time.monotonic() + PATIENCE_S
        for one in told:
            one.wait(max(0.0, until - time.monotonic()))


class Telling:
    """One tracker, and the thread that tells it. Whatever it raises ends the telling with one warning, not the run."""

    def __init__(self, name: str, run_dir: Path, config: RunConfig, open_: Open | None = None) -> None:
        """open_: opens it; None: the tracker of that name."""
        self.name = name
        self._run_dir, self._config, self._open = run_dir, config, open_ or opener(name)
        self._mark = run_dir / "tracking" / f"{name}.json"
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tell, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """The event is told soon, if it is one for trackers. Never waits."""
        if isinstance(event, RunStarted | RoundDone | RunDone):
            self._events.put(event)

    def hang_up(self) -> None:
        """Nothing more will be told."""
        self._events.put(None)

    def wait(self, seconds: float) -> None:
        """All is told, or the time is up."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("tracking: %s takes no end; the run goes on without it", self.name)

    def _tell(self) -> None:
        tracker, have, finished = None, Tracked(run=""), False
        try:
            while (event := self._events.get()) is not None:
                if isinstance(event, RunStarted):
                    tracker, have = self._opened()
                    for line in run_rounds(self._run_dir):
                        have = self._round(tracker, have, line)
                elif tracker is not None and isinstance(event, RoundDone):
                    have = self._round(tracker, have, event.round)
                elif tracker is not None and isinstance(event, RunDone):
                    tracker.finish(told_summary(event.summary))
                    finished = True
            if tracker is not None:
                tracker.close(finished=finished)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            log.warning(
                "tracking: %s failed (%s: %s); the run goes on without it, and rounds.jsonl has everything",
                self.name,
                type(error).__name__,
                first,
            )

    def _opened(self) -> Opened:
        make_directory(self._mark.parent)
        have = self._read() or Tracked(run=secrets.token_hex(8))
        self._write(have)  # before the tracker knows of it: a crash then makes no second run
        tracker, have = self._open(self._run_dir, told_config(self._config), have)
        self._write(have)
        return tracker, have

    def _round(self, tracker: Tracker, have: Tracked, line: Mapping[str, Any]) -> Tracked:
        number = line["round"]
        if number <= have.told:
            return have
        tracker.round(number, figures(line))
        have = replace(have, told=number)
        self._write(have)
        return have

    def _read(self) -> Tracked | None:
        if not self._mark.exists():
            return None
        try:
            words = json.loads(self._mark.read_text(encoding="utf-8"))
            return Tracked(run=str(words["run"]), told=int(words["told"]))
        except (ValueError, KeyError, TypeError):
            raise IncompleteError(f"{self._mark} is damaged; remove it, and a new run begins there") from None

    def _write(self, have: Tracked) -> None:
        write_durably(self._mark, json.dumps({"run": have.run, "told": have.told}) + "\n")


def opener(name: str) -> Open:
    """What opens the tracker of that name. Its package is imported by that, and not before."""
    match name:
        case "tensorboard":
            from fedlora.tracking.tensorboard import open_tensorboard

            return open_tensorboard
        case "wandb":
            from fedlora.tracking.wandb import open_wandb

            return open_wandb
        case "mlflow":
            from fedlora.tracking.mlflow import open_mlflow

            return open_mlflow
    raise ConfigError(f"tracking: {name!r} is no tracker; write some of {', '.join(PACKAGES)}")
