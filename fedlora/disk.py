"""Writing so that a power cut leaves the old or the new, never half of either."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_durably(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """`path` holds `content`, whole: written aside, fsynced, renamed. mode: its rights, less what the umask takes."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    fsync(path.parent)


def append_durably(path: Path, text: str) -> None:
    """`text` stands at the end of `path` and is fsynced."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        fsync(path.parent)


def make_directory(path: Path) -> None:
    """`path` is a directory, and a power cut takes neither it nor those above it that had to be made."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    fsync(path.parent)


@contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """No other process is within, of those that ask for `path`, a file for nothing else; whoever comes waits."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(file: IO[Any] | int, *, shared: bool = False) -> bool:
    """Whether the lock on the open file is ours from here on, until it is closed; nobody is waited for.

    shared: with others who ask for it so.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Every JSON line of `path` that was written whole; a last one torn by a crash never counted."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def fsync(path: Path) -> None:
    """What the file or directory holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
