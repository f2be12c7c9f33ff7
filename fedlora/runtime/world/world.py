"""The world that a config describes: who is there when, and how long whom a round takes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.config import world as config
from fedlora.runtime.world.availability import Availability, availability
from fedlora.runtime.world.draws import lognormal, uniform
from fedlora.runtime.world.tables import read_speeds

Seconds = Callable[[str, int], float]
"""Seconds of work of a client in a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Pure functions of a seed. digest: of all that they are made from, files included."""

    availability: Availability
    seconds: Seconds
    digest: str


def build(section: config.World, clients: Sequence[str], seed: int) -> World:
    """The world of these clients.

    Raises:
        ConfigError: a file cannot be read, or says nothing of some client.
    """
    return World(
        availability=availability(section.availability, clients, seed),
        seconds=_seconds(section, clients, seed),
        digest=_digest(section, seed),
    )


def _seconds(section: config.World, clients: Sequence[str], seed: int) -> Seconds:
    usual, stragglers = _usual(section.speed, clients, seed), section.stragglers

    def seconds(client: str, round_: int) -> float:
        lags = stragglers is not None and (
            uniform(seed, "world", "straggler", client, round_) < stragglers.share
        )
        return usual(client, round_) * (stragglers.factor if stragglers is not None and lags else 1.0)

    return seconds


def _usual(section: config.Speed, clients: Sequence[str], seed: int) -> Seconds:
    match section:
        case config.Instant():
            return lambda client, round_: 0.0
        case config.Lognormal(median_s=median_s, sigma=sigma, round_sigma=round_sigma):
            medians = {
                client: median_s * lognormal(sigma, seed, "world", "speed", client) for client in clients
            }
        case config.SpeedFile(round_sigma=round_sigma):
            medians = read_speeds(section, clients)
    return lambda client, round_: (
        medians[client] * lognormal(round_sigma, seed, "world", "round speed", client, round_)
    )


def _digest(section: config.World, seed: int) -> str:
    found = hashlib.sha256(json.dumps([section.model_dump(mode="json"), seed], sort_keys=True).encode())
    for part in (section.availability, section.speed):
        if isinstance(part, config.Trace | config.SpeedFile):
            found.update(hashlib.sha256(Path(part.path).read_bytes()).digest())
    return found.hexdigest()
