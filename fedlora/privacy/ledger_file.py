"""The ledger's file: one writer at a time, each line on the disk before the call returns."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlora.disk import fsync, make_directory
from fedlora.errors import LedgerError
from fedlora.privacy.ledger_format import Contents, Debit, Release, is_sound, line, parse


def repaired(descriptor: int, path: Path) -> Contents:
    """The file's contents, its end repaired: a torn line is cut off, a whole one gets its lost newline."""
    text = _read_all(descriptor)
    contents = parse(text, str(path))
    if len(text) == contents.size + 1:
        return contents
    if len(text) > contents.size:
        os.ftruncate(descriptor, contents.size + 1)
    else:
        os.write(descriptor, b"\n")
    os.fsync(descriptor)
    return contents


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def append(descriptor: int, path: Path, contents: Contents, entry: Debit | Release) -> None:
    """One more line, fsynced; the file is as before if it could not be written."""
    # What cannot be read back must never be written: it would make the ledger useless.
    if isinstance(entry, Debit) and not is_sound(entry):
        raise LedgerError(
            f"{path}: {entry} is no debit; need floats in range, a whole round and at least one step"
        )
    try:
        _write(descriptor, path, line(entry, contents.head))
    except OSError:
        os.ftruncate(descriptor, contents.size + 1)
        raise


def create(path: Path, header: bytes) -> None:
    """A new file with its header, whole or not at all: written aside, synced, then linked under its name."""
    make_directory(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(descriptor, path, header)
        finally:
            os.close(descriptor)
        # Another process may make it first; the header check that follows tells whether it is ours.
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync(path.parent)


def _write(descriptor: int, path: Path, text: bytes) -> None:
    """All of `text`, fsynced."""
    written = os.write(descriptor, text)
    if written != len(text):
        raise OSError(errno.ENOSPC, f"only {written} of {len(text)} bytes could be written", str(path))
    os.fsync(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """The file's descriptor; no other process has it meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def as_ledger_error(path: Path) -> Iterator[None]:
    """Whatever the operating system refuses is a LedgerError."""
    try:
        yield
    except OSError as error:
        raise LedgerError(
            f"{path}: {error.strerror or error}; nothing may be released until it can be written"
        ) from error
