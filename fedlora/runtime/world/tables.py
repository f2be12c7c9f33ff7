"""The files a world may be read from: csv or jsonl, a client a line."""

import csv
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.world import SpeedFile, Trace
from fedlora.errors import ConfigError

SHOWN = 3
"""Names that an error repeats."""


def require_all(where: str, held: Collection[str], clients: Sequence[str]) -> None:
    """Passes only if every client is named.

    Raises:
        ConfigError: one is not; taking it for never there would hide a mistyped name.
    """
    missing = [client for client in clients if client not in held]
    if missing:
        first = ", ".join(map(repr, missing[:SHOWN]))
        raise ConfigError(
            f"{where} lacks {len(missing)} of {len(clients)} clients ({first}, ...); name every client, "
            f"as {clients[0]!r}"
        )


def read_intervals(section: Trace, clients: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Of each client the intervals [from_s, until_s) it is there, sorted, those that touch made one.

    Raises:
        ConfigError: the file cannot be read, an interval is none, or a client of the run is missing.
    """
    wanted, path = set(clients), Path(section.path)
    intervals: dict[str, list[tuple[float, float]]] = {}
    for number, row in _rows(path):
        from_s, until_s = (_seconds(row, key, path, number) for key in ("from_s", "until_s"))
        last = until_s if section.repeat_s is None else section.repeat_s
        if not from_s < until_s <= last:
            raise ConfigError(
                f"{path}:{number}: from_s {from_s:g}, until_s {until_s:g}; until_s must be after from_s and "
                f"no later than world.availability.repeat_s ({section.repeat_s})"
            )
        if (client := str(row.get("client"))) in wanted:
            intervals.setdefault(client, []).append((from_s, until_s))
    require_all(f"{path} (world.availability)", intervals, clients)
    return {client: _joined(held) for client, held in intervals.items()}


def read_speeds(section: SpeedFile, clients: Sequence[str]) -> Mapping[str, float]:
    """Seconds of each client's round.

    Raises:
        ConfigError: the file cannot be read, a number is none, or a client of the run is missing.
    """
    path = Path(section.path)
    speeds = {str(row.get("client")): _seconds(row, section.column, path, n) for n, row in _rows(path)}
    require_all(f"{path} (world.speed)", speeds, clients)
    return speeds


def _joined(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for from_s, until_s in sorted(intervals):
        if joined and from_s <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(until_s, joined[-1][1]))
        else:
            joined.append((from_s, until_s))
    return joined


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """(line, its fields) of each line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a csv or jsonl file in UTF-8") from None
    if path.suffix != ".jsonl":
        return list(enumerate(csv.DictReader(text.splitlines()), start=2))
    return [(number, _fields(line, path, number)) for number, line in enumerate(text.splitlines(), start=1)]


def _fields(line: str, path: Path, number: int) -> Mapping[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}:{number}: {line[:60]!r} is no JSON object; write one a line")
    return fields


def _seconds(row: Mapping[str, Any], key: str, path: Path, number: int) -> float:
    try:
        seconds = float(row[key])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}:{number}: no number of seconds under {key!r}; columns are {', '.join(map(str, row))}"
        ) from None
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise ConfigError(f"{path}:{number}: {key} {seconds}; write seconds from 0 on")
    return seconds
