"""Errors that show only while a run is prepared, told like those of the YAML itself: file, line, key."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from fedlora.config.load import load_config, origin_of, origins_of
from fedlora.errors import ConfigError, LedgerError, PrivacyError

Key: TypeAlias = tuple[str, ...]
"""The words of a dotted key."""


@contextmanager
def located(path: Path | str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """A ConfigError or PrivacyError of the block that speaks of a key of this config begins `FILE:LINE: key`.

    The key is the one that the message begins with, or else the first that occurs in it: dotted, or its last
    word where that belongs to one key alone. A message about a file belongs to the key that names the file.
    """
    config = load_config(path, overrides)
    known = dict(flat(config.model_dump(mode="json")))
    origins = origins_of(path, overrides)
    try:
        yield
    except (ConfigError, PrivacyError) as error:
        key = None if isinstance(error, LedgerError) else _spoken_of(str(error), known)
        if key is not None:
            error.args = (_located(str(error), key, origin_of(key, origins)),)
        raise


def _located(message: str, key: Key, origin: str) -> str:
    name = ".".join(key)
    return f"{origin}: {message}" if message.startswith(name) else f"{origin}: {name}: {message}"


def _spoken_of(message: str, known: Mapping[Key, Any]) -> Key | None:
    for key, value in known.items():
        if message.startswith(f"{'.'.join(key)}: ") or (
            isinstance(value, str) and message.startswith(f"{value}: ")
        ):
            return key
    dotted = {".".join(key): key for key in known}
    last_words = [name.rpartition(".")[2] for name in dotted]
    places: list[tuple[int, int, Key]] = []
    for (name, key), last in zip(dotted.items(), last_words, strict=True):
        # One word alone (seed, rounds, name) may be plain English; a dot or an underscore tells a key.
        spellings = [word for word in (name, last) if "." in word or "_" in word]
        for spelling in spellings if last_words.count(last) == 1 else spellings[:1]:
            if found := re.search(rf"(?<![\w.]){re.escape(spelling)}(?!\w|\.\w)", message):
                places.append((found.start(), -len(spelling), key))
    return min(places)[2] if places else None


def flat(section: Mapping[str, Any], path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every key with its value, sections too."""
    for name, value in section.items():
        yield (*path, name), value
        if isinstance(value, Mapping):
            yield from flat(value, (*path, name))
