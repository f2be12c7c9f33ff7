"""What a tracker is told: numbers of the federation as a whole, no client's name, nothing that was not released."""

import math
from collections.abc import Mapping
from typing import Any

from fedlora.algebra.diagnostics import signal_to_noise
from fedlora.config.schema import RunConfig


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Of a round, by name; what the line does not know is left out.

    `test/METRIC`, `test/loss`, `epsilon_max`, how many were `clients/asked`, `answered`, `refused` and `rejected`,
    `seconds`, `public_clip_share`, and the updates' mean `update_norm`, `noise_norm` and `signal_to_noise`.

    Args:
        line: of rounds.jsonl.
    """
    found: dict[str, float | None] = {
        f"test/{line.get('metric')}": line.get("score"),
        "test/loss": line.get("loss"),
        "epsilon_max": line.get("epsilon_max"),
        **{f"clients/{what}": len(line[what]) for what in ("asked", "answered", "refused", "rejected")},
        "seconds": line["seconds"],
        "public_clip_share": line.get("public_clip_share"),
        **_lengths(line.get("update_norm", {}), line.get("noise_norm", {})),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _lengths(updates: Mapping[str, float], noises: Mapping[str, float]) -> dict[str, float]:
    found = {"update_norm": _mean(updates), "noise_norm": _mean(noises)}
    energy = sum(updates[client] ** 2 for client in noises if client in updates)
    noise = sum(length**2 for length in noises.values())
    if noise > 0:
        found["signal_to_noise"] = signal_to_noise(energy, noise)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _mean(lengths: Mapping[str, float]) -> float:
    return sum(lengths.values()) / len(lengths) if lengths else math.nan


def told_config(config: RunConfig) -> dict[str, Any]:
    """The config as a tracker has it: without `output`, and with how many clients a key names, not which."""
    words = config.model_dump(mode="json", exclude={"output"})
    federation, world = words["federation"], words["world"] or {}
    for section, key in (
        (federation, "ranks"),
        (federation["cohort"], "probability"),
        (world.get("availability"), "probability"),
    ):
        if isinstance(section, dict) and isinstance(section.get(key), dict):
            section[key] = f"of {len(section[key])} clients"
    return words


def told_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of summary.json, each key with one value; what lists clients is left out."""
    return {name: value for name, value in summary.items() if isinstance(value, str | int | float | bool)}


def flat(words: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    found: dict[str, Any] = {}
    for key, value in words.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found
