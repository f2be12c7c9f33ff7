"""Errors that show only while a run is prepared, told like those of the YAML itself: file, line, key."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from fedlora.config.load import OVERRIDE, load_config, origin_of, origins_of
from fedlora.config.yaml_text import KeyPath
from fedlora.errors import ConfigError, LedgerError, PrivacyError

Key: TypeAlias = tuple[str, ...]
"""The words of a dotted key."""


@contextmanager
def located(path: Path | str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """A ConfigError or PrivacyError of the block that speaks of a key of this config begins `FILE:LINE: key`.

    The key is the one that the message begins with, or else the first that occurs in it: dotted, or its last
    word where that belongs to one key alone. A message about a file belongs to the key that names the file. Where that
    one was written in the file, but another that the message speaks of, or quotes the value of, was overridden, it is
    the other.
    """
    config = load_config(path, overrides)
    known = dict(flat(config.model_dump(mode="json")))
    origins = origins_of(path, overrides)
    try:
        yield
    except (ConfigError, PrivacyError) as error:
        message = str(error)
        if not isinstance(error, LedgerError) and (key := _at_fault(message, known, origins)) is not None:
            error.args = (_located(message, key, known, origin_of(key, origins)),)
        raise


def _located(message: str, key: Key, known: Iterable[Key], origin: str) -> str:
    names_one = any(len(one) > 1 and message.startswith(".".join(one)) for one in (key, *known))
    return f"{origin}: {message}" if names_one else f"{origin}: {'.'.join(key)}: {message}"


def _at_fault(message: str, known: Mapping[Key, Any], origins: Mapping[KeyPath, str]) -> Key | None:
    spoken_of = _spoken_of(message, known)
    overridden = [key for key in known if origin_of(key, origins).startswith(OVERRIDE)]
    if not spoken_of or spoken_of[0] in overridden:
        return spoken_of[0] if spoken_of else None
    wrong, _, _ = message.partition("; ")  # the mend may quote what is right
    quoted = (key for key in overridden if isinstance(known[key], str) and repr(known[key]) in wrong)
    return next((key for key in spoken_of if key in overridden), next(quoted, spoken_of[0]))


def _spoken_of(message: str, known: Mapping[Key, Any]) -> list[Key]:
    """The key that the message begins with, if it does, and all that occur in it, from left to right."""
    first = [
        key
        for key, value in known.items()
        if message.startswith(f"{'.'.join(key)}: ")
        or (isinstance(value, str) and message.startswith(f"{value}: "))
    ]
    dotted = {".".join(key): key for key in known}
    last_words = [name.rpartition(".")[2] for name in dotted]
    places: list[tuple[int, int, Key]] = []
    for (name, key), last in zip(dotted.items(), last_words, strict=True):
        # One word alone (seed, rounds, name) may be plain English; a dot or an underscore tells a key.
        spellings = [word for word in (name, last) if "." in word or "_" in word]
        for spelling in spellings if last_words.count(last) == 1 else spellings[:1]:
            if found := re.search(rf"(?<![\w.]){re.escape(spelling)}(?!\w|\.\w)", message):
                places.append((found.start(), -len(spelling), key))
    return [*first[:1], *(key for _, _, key in sorted(places))]


def flat(section: Mapping[str, Any], path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every key with its value, sections too."""
    for name, value in section.items():
        yield (*path, name), value
        if isinstance(value, Mapping):
            yield from flat(value, (*path, name))
