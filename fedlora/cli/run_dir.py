"""What may go wrong with a directory that runs are kept in, and what to say when somebody stops them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import ConfigError


@contextmanager
def usable(run_dir: Path) -> Iterator[None]:
    """What the system refuses to do with the run directory is a ConfigError that names it; all else passes.

    Raises:
        ConfigError: the directory cannot be made, read or written, or its disk is full.
    """
    mend = "choose another --run-dir or output"
    for place in (run_dir, *run_dir.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise ConfigError(f"{place} is no directory, so no run can be kept in {run_dir}; {mend}")
            break
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL and not _concerns(error, run_dir):
            raise
        why = error.strerror or type(error).__name__
        raise ConfigError(
            f"{run_dir} cannot be used as a run directory ({why}); make it writable, or {mend}"
        ) from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _concerns(error: OSError, run_dir: Path) -> bool:
    """Whether the error names the directory, something in it, or one that it was to be made in."""
    if not isinstance(error.filename, str | os.PathLike):
        return False
    named, ours = Path(error.filename).resolve(), run_dir.resolve()
    return named.is_relative_to(ours) or ours.is_relative_to(named)


def interruption(run_dir: Path) -> str:
    """What to say to somebody who pressed Ctrl-C."""
    if (run_dir / "config.yaml").exists():
        return f"interrupted; every finished round is kept, go on with: fedlora resume {run_dir}"
    return "interrupted before the first round; nothing was written, give the same command again"
