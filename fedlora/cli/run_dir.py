"""Which file or directory is meant, what may go wrong with one that runs are kept in, and what Ctrl-C is answered."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import ConfigError


def config_named(path: Path) -> Path:
    """The config that is meant: the file itself, or the one that `fedlora init` wrote into this directory.

    Raises:
        ConfigError: there is none in the directory.
    """
    if not path.is_dir():
        return path
    for name in ("run.yaml", "node.yaml"):
        if (path / name).exists():
            return path / name
    if (path / "config.yaml").exists():
        raise ConfigError(
            f"{path} is a run's directory, no config; go on with: fedlora resume {path}, or name {path}/config.yaml"
        )
    raise ConfigError(f"{path} holds no run.yaml; name another, or write one there: fedlora init {path}")


def run_dir_named(path: Path | None) -> Path | None:
    """The run directory that is meant: this one, or the `output` of this config, or of the run.yaml in this directory.

    Raises:
        ConfigError: nothing was kept there yet, or another config's run, or the config is wrong.
    """
    if path is None or (path / "config.yaml").exists():
        return path
    config = path / "run.yaml" if path.is_dir() else path
    if not config.is_file():
        return path
    from fedlora.config.load import load_config, require_same

    given = load_config(config)
    output = Path(given.output)
    if not (output / "config.yaml").exists():
        raise ConfigError(
            f"{path} holds no run: {config} was not run yet, or not into its output {output}; start it with fedlora "
            f"simulate {config}, or name the directory that it was run into"
        )
    try:
        require_same(load_config(output / "config.yaml"), given, output)
    except ConfigError as error:  # else a client of another run would be forgotten
        raise ConfigError(f"{error}; or name the run itself: {output}") from None
    return output


def kept_in(path: Path) -> Path:
    """The run directory that is meant, where init's directory or a run's config is named; anything else is itself."""
    from fedlora.config.kinds import is_node

    of_a_run = path.is_dir() or (path.suffix in (".yaml", ".yml") and path.is_file() and not is_node(path))
    return (of_a_run and run_dir_named(path)) or path


def scorable(path: Path) -> Path:
    """The run or PEFT adapter that is meant, known by its files before any work is done for it.

    Raises:
        ConfigError: it is neither.
    """
    path = kept_in(path)
    if any((path / name).exists() for name in ("config.yaml", "adapter_config.json")):
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory; name a run's, or an adapter's")
    if (path / "config.json").exists():
        raise ConfigError(
            f"{path} is a whole model (config.json, and no adapter_config.json), perhaps one of export --merge; only "
            "adapters are scored: name the run that it was made of, or export that once more without --merge"
        )
    raise ConfigError(
        f"{path} is neither a run nor a PEFT adapter (no config.yaml, no adapter_config.json); name one of the two"
    )


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
