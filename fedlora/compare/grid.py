"""Grids of settings: which keys take which values, and every combination of them."""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedlora.compare.arms import as_value
from fedlora.compare.cells import Source
from fedlora.config.explain import shown
from fedlora.config.located import flat
from fedlora.config.schema import RunConfig
from fedlora.config.yaml_text import parse
from fedlora.errors import ConfigError

MOST_SETTINGS = 10_000
"""More are a typing error."""
_OURS = {
    "seed": "write --seeds N, which counts up from the config's",
    "output": "write --to DIR",
    "tracking": "it changes no result",
    "privacy.tuned_on": "it changes no result but a statement",
    "runtime": "it changes no result; the runs of a sweep each take one core",
}
"""Keys that a sweep sets itself, or that change nothing in its table, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A dotted key and the values that it takes, in the order of the table."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One combination. values: one a key, in the order of the axes. name: its own among all grids, fit for a file."""

    values: tuple[tuple[str, Any], ...]
    name: str

    def overrides(self) -> tuple[str, ...]:
        """As for `--set`."""
        return tuple(f"{key}={as_value(value)}" for key, value in self.values)


def axes_of(grids: Sequence[str]) -> list[Axis]:
    """The axes that `--grid` options describe: `KEY=VALUE,VALUE,...`, or a YAML file of `KEY: [VALUE, ...]` lines.

    Raises:
        ConfigError: one is neither, has no values or one twice, or two have the same key.
    """
    axes = [axis for text in grids for axis in _read(text)]
    if not axes:
        raise ConfigError("--grid: nothing to vary; write for example --grid privacy.target_epsilon=1,3,8")
    for key, count in Counter(axis.key for axis in axes).items():
        if count > 1:
            raise ConfigError(f"--grid: {key} is there {count} times; put all its values in one --grid")
    for axis in axes:
        _require_sound(axis)
    return axes


def settings_of(axes: Sequence[Axis]) -> list[Setting]:
    """Every combination, the last axis moving fastest.

    Raises:
        ConfigError: they are too many to be meant.
    """
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST_SETTINGS:
        raise ConfigError(
            f"--grid: {count:,} settings; write fewer values, {MOST_SETTINGS:,} together at most"
        )
    keys = [axis.key for axis in axes]
    combined = product(*(axis.values for axis in axes))
    return [_setting(tuple(zip(keys, values, strict=True))) for values in combined]


def checked(source: Source, setting: Setting) -> RunConfig:
    """The config of a setting.

    Raises:
        ConfigError: it is none; names the `--grid` that it came from and the nearest key.
    """
    try:
        return source.config(setting.overrides())
    except ConfigError as error:
        message = str(error)
        _require_known(setting, source)
        for override in setting.overrides():
            message = message.replace(f"--set {override}", f"--grid {override}")
        raise ConfigError(message) from None


def _require_known(setting: Setting, source: Source) -> None:
    """Refuses a key that the config lacks, if it looks like one that it has: the schema would only call it unknown."""
    known = [".".join(key) for key, _ in flat(source.config().model_dump(mode="json"))]
    for key, _ in setting.values:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if key not in known and near:
            raise ConfigError(f"--grid {key}: unknown key; write {near[0]}")


def _read(text: str) -> Iterator[Axis]:
    key, equals, values = (part.strip() for part in text.partition("="))
    if equals:
        found = parse(f"[{values}]", f"--grid {text}").value
        yield Axis(key=key, values=tuple(found))
        return
    path = Path(text)
    try:
        value = parse(path.read_text(encoding="utf-8"), text).value
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"--grid {text}: neither KEY=VALUE,VALUE,... nor a YAML file that can be read; write for example "
            "--grid privacy.target_epsilon=1,3,8"
        ) from None
    if not isinstance(value, dict) or not all(isinstance(values, list) for values in value.values()):
        raise ConfigError(
            f"--grid {text}: {shown(value)} is no grid; write lines like privacy.target_epsilon: [1, 3, 8]"
        )
    yield from (Axis(key=str(key), values=tuple(values)) for key, values in value.items())


def _require_sound(axis: Axis) -> None:
    for ours, mend in _OURS.items():
        if axis.key == ours or axis.key.startswith(f"{ours}."):
            raise ConfigError(f"--grid {axis.key}: no sweep varies it; {mend}")
    if not axis.values:
        raise ConfigError(f"--grid {axis.key}: no values; write for example {axis.key}=1,2")
    written = [as_value(value) for value in axis.values]
    twice = next((value for value, count in Counter(written).items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"--grid {axis.key}: {twice} is there twice; --seeds runs a setting more than once")


def _setting(values: tuple[tuple[str, Any], ...]) -> Setting:
    words = "_".join(f"{key.rpartition('.')[2]}-{as_value(value)}" for key, value in values)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip(".-")[:60]
    digest = hashlib.sha256(as_value(sorted(values, key=lambda pair: pair[0])).encode()).hexdigest()[:8]
    return Setting(values=values, name=f"{safe}-{digest}")
