"""Where a server's process can be made to die, what it can run out of: done in it beforehand."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.algebra import mixing as mixing_module
from fedlora.algebra.mixing import RunningMix
from fedlora.deploy import journal as journal_module
from fedlora.deploy import server as server_module
from fedlora.deploy.journal import Journal
from fedlora.federation import loop as loop_module
from fedlora.federation import store as store_module
from fedlora.federation.memory import StaleMemory
from fedlora.federation.store import Store
from fedlora.transport import flower_cohort
from tests.faults.grid import Wire
from tests.faults.kills import die, dies_after

Does = Callable[[], object]


def around(owner: object, name: str, step: Callable[..., Any]) -> None:
    """`owner.name` becomes `step(real, *arguments)`."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: step(real, *arguments, **named))


def dies_with(owner: object, name: str, is_it: Callable[..., bool]) -> None:
    """The process is gone once `owner.name` was done with arguments of which that is true."""

    def step(real: Callable[..., Any], *arguments: object, **named: object) -> object:
        result = real(*arguments, **named)
        if is_it(*arguments):
            die()
        return result

    around(owner, name, step)


def state_of_round_2(path: Path, *anything: object) -> bool:
    """Of what `write_durably` writes, the words of that checkpoint."""
    return path.name == "state.json" and "round-000002" in path.parent.name


def _third_folder_sync() -> Callable[[Path], bool]:
    # One for the state before the first round, then one a round; the rename comes just before.
    seen: list[Path] = []
    return lambda path: path.name == "checkpoints" and (seen.append(path) or len(seen) == 3)


BEGINNING: dict[str, Does] = {
    "roster saved": lambda: dies_after(server_module, "save_roster"),
    "config written": lambda: dies_with(
        server_module, "write_durably", lambda path, *_: path.suffix == ".yaml"
    ),
    "first checkpoint": lambda: dies_after(Store, "_write_checkpoint"),
    "first line": lambda: dies_after(Store, "begin"),
}
"""Points before anybody is asked."""

POINTS: dict[str, Does] = {
    "S0 plan saved": lambda: dies_after(Store, "save_plan", 2),
    "S1 reply read": lambda: dies_after(flower_cohort, "decode_reply", 3),
    "S1b bytes stored": lambda: dies_after(journal_module, "write_durably", 3),
    "S2 reply journalled": lambda: dies_after(Journal, "write", 3),
    "S3 acknowledged": lambda: dies_with(
        Wire, "_push", lambda wire, message: "fedlora.echo" in message.content
    ),
    "S4 first of two in the sums": lambda: dies_after(RunningMix, "add", 3),
    "S4b sums closed": lambda: dies_after(mixing_module, "from_frame", 2),
    "S5 refactorised": lambda: dies_after(loop_module, "absorb", 2),
    "S5b first of two remembered": lambda: dies_after(StaleMemory, "keep", 3),
    "S5c memory stored": lambda: dies_after(StaleMemory, "commit", 2),
    "S6 checkpoint aside": lambda: dies_with(store_module, "write_durably", state_of_round_2),
    "S7 renamed": lambda: dies_with(store_module, "fsync", _third_folder_sync()),
    "S8 line written": lambda: dies_after(store_module, "append_durably", 2),
}
"""Points in the second round; two nodes answer each. Sums and memory grow with each reply while the round goes on."""


def nth(number: int) -> Callable[..., bool]:
    """True of one call alone."""
    left = [number]

    def is_it(*anything: object) -> bool:
        left[0] -= 1
        return left[0] == 0

    return is_it


def full_during(owner: object, name: str, is_it: Callable[..., bool], room: int) -> None:
    """While `owner.name` is at work on that, no file has more than `room` bytes left to grow by."""

    def step(real: Callable[..., Any], *arguments: Any, **named: object) -> object:
        if not is_it(*arguments):
            return real(*arguments, **named)
        first, (_, hard) = arguments[0], resource.getrlimit(resource.RLIMIT_FSIZE)
        held = first.stat().st_size if isinstance(first, Path) and first.exists() else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (held + room, hard))
        try:
            return real(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    around(owner, name, step)


def sync_fails(file: Callable[[Path], bool], at: int, after: Path) -> None:
    """The `at`-th fsync of such a file fails, and any that follows is noted in `after`."""
    real, left = os.fsync, [at]

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if left[0] == 0:
            with after.open("a") as noted:
                noted.write(f"{path}\n")
        elif file(path):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    os.fsync = fsync


def no_memory_left() -> None:
    """The second round's sums find no memory when they are closed; what the process has already stays its own."""
    calls = [2]

    def step(real: Callable[..., Any], *arguments: object) -> object:
        calls[0] -= 1
        if not calls[0]:
            resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
            bytearray(1 << 28)
        return real(*arguments)

    around(mixing_module, "from_frame", step)
