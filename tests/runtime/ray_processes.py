"""The processes that a run on Ray has on this machine."""

import os
from contextlib import suppress
from pathlib import Path

from fedlora.runtime.crew import HostActor


def below(root: int) -> dict[int, str]:
    """Command lines of the processes that this one started, and that those did."""
    status: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it may be gone by now
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                status[int(entry.name)] = (parent, (entry / "cmdline").read_bytes().decode(errors="replace"))

    def is_below(pid: int) -> bool:
        while pid in status and pid != root:
            pid = status[pid][0]
        return pid == root

    return {pid: title for pid, (_, title) in status.items() if is_below(pid)}


def own_workers() -> list[int]:
    """Ray's worker processes below this one: another run on the machine is none of our business."""
    return _titled(f"ray::{HostActor.__name__}")


def answering_workers() -> list[int]:
    """Those of them that are about to answer, or do."""
    return _titled(f"ray::{HostActor.__name__}.{HostActor.answer.__name__}")


def _titled(words: str) -> list[int]:
    return sorted(pid for pid, title in below(os.getpid()).items() if title.startswith(words))
