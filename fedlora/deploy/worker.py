"""The process that works on a server's run: started here, outliving whoever started it, known by a lock it holds."""

import json
import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fedlora.disk import make_directory, try_lock
from fedlora.errors import ConfigError
from fedlora.runs.rundir import taken

log = logging.getLogger(__name__)

LOG = "server.log"
"""In the run directory: what the process says."""


class Worker:
    """At most one process per run directory. Its lock goes with it, however it ends, and tells another supervisor."""

    def __init__(self, run_dir: Path, command: Sequence[str]) -> None:
        """Starts nothing yet.

        Args:
            run_dir: exists.
            command: reads its order as one line of JSON from stdin; `held` in it is the descriptor of the lock.
        """
        self._command = command
        self._lock = run_dir / ".worker.lock"
        self._log = run_dir / LOG
        self._child: subprocess.Popen[bytes] | None = None

    def is_at_work(self) -> bool:
        """Whether the process lives, whoever started it."""
        if self._child is not None:
            self._child.poll()  # or it stays a zombie
        with self._lock.open("a") as file:
            return not try_lock(file)

    def start(self, order: Mapping[str, Any]) -> None:
        """The process runs, if none did; its order, which may hold a secret, is on no command line and no disk.

        It is in a session of its own: it stays when the supervisor is stopped, and no Ctrl-C reaches it.
        """
        with self._lock.open("a+") as lock, self._log.open("ab") as said:
            # The child shares this lock: only closing our end leaves it to the child alone.
            if not try_lock(lock):
                return
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                self._command,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            lock.truncate(0)
            lock.write(f"{self._child.pid}\n")
            lock.flush()
            pipe = self._child.stdin
            assert pipe is not None
            try:
                pipe.write(json.dumps({**order, "held": lock.fileno()}).encode() + b"\n")
                pipe.close()
            except BrokenPipeError:
                log.warning("the server's process ended at once; see %s", self._log)

    def end(self, number: signal.Signals) -> None:
        """The process, if it lives, was sent this signal."""
        if self.is_at_work() and (pid := self.pid()) is not None:
            os.kill(pid, number)  # it holds the lock, so the number is still its own

    def pid(self) -> int | None:
        """The id of the process that was started last; None if nobody knows."""
        word = self._lock.read_text().strip() if self._lock.exists() else ""
        return int(word) if word.isdigit() else None


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """The directory exists, and no other supervisor works on it.

    Raises:
        ConfigError: one does, or the directory cannot be made.
    """
    try:
        make_directory(run_dir)
        file = (run_dir / ".serve.lock").open("a")
    except OSError as error:
        raise ConfigError(
            f"output: {run_dir} cannot be written ({error.strerror}); make it writable"
        ) from None
    with file:
        if not taken(file):
            raise ConfigError(f"output: {run_dir} is served by another process; stop that one first")
        yield


@contextmanager
def until_told() -> Iterator[None]:
    """SIGTERM and SIGINT end the block, at once and without an error; main thread only."""

    def tell(number: int, frame: FrameType | None) -> None:
        raise Told

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, tell) for number in numbers}
    try:
        yield
    except Told:
        log.info("stopped; a run that was going on goes on, and the same command follows it again")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Told(BaseException):
    """SIGTERM or SIGINT. No Exception: nothing on the way takes it for a failure, and anything may be cut short."""
