"""When a client is there: pure functions of the seed, the client and the time in virtual seconds from the start."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Protocol

from fedlora.config import world as config
from fedlora.runtime.world.draws import beta, exponential, group_of, uniform
from fedlora.runtime.world.tables import read_intervals, require_all


class Availability(Protocol):
    """Laws: equal arguments give equal answers in any order; nobody leaves while `is_there` says it is there."""

    def is_there(self, client: str, at_s: float) -> bool:
        """Whether the client can be reached at that time."""
        ...

    def leaves(self, client: str, at_s: float, before_s: float) -> float | None:
        """When a client that is there at `at_s` first goes away, if that is before `before_s`; else None."""
        ...


def availability(section: config.Availability, clients: Sequence[str], seed: int) -> Availability:
    """What the config describes, for these clients.

    Raises:
        ConfigError: a client has no probability or no line of the trace, or the trace cannot be read.
    """
    match section:
        case config.Always():
            return Always()
        case config.DayNight():
            return DayNight(section, seed)
        case config.Uneven():
            return Uneven(section, clients, seed)
        case config.DropOuts():
            return DropOuts(section, seed)
        case config.Trace():
            return Trace(read_intervals(section, clients), section.repeat_s)


class Always:
    """Everybody is there."""

    def is_there(self, client: str, at_s: float) -> bool:
        """See Availability."""
        return True

    def leaves(self, client: str, at_s: float, before_s: float) -> float | None:
        """See Availability."""
        return None


class DayNight:
    """There in the first `share` of each period, which begins at another time for each client or group."""

    def __init__(self, section: config.DayNight, seed: int) -> None:
        self.section = section
        self.seed = seed

    def phase(self, client: str) -> float:
        """How far into its period a client is at time 0, in [0, 1)."""
        if (groups := self.section.groups) is not None:
            return group_of(groups, self.seed, client) / groups
        return uniform(self.seed, "world", "phase", client)

    def is_there(self, client: str, at_s: float) -> bool:
        """See Availability."""
        return (at_s / self.section.period_s + self.phase(client)) % 1.0 < self.section.share

    def leaves(self, client: str, at_s: float, before_s: float) -> float | None:
        """See Availability."""
        period_s, share, phase = self.section.period_s, self.section.share, self.phase(client)
        if share == 1:
            return None
        dusk = (math.floor(at_s / period_s + phase) + share - phase) * period_s
        return max(at_s, dusk) if dusk < before_s else None


class Uneven:
    """There in a slot of time with the client's own probability, independently of every other slot and client."""

    def __init__(self, section: config.Uneven, clients: Sequence[str], seed: int) -> None:
        self.slot_s = section.slot_s
        self.seed = seed
        self.probability = _probabilities(section, clients, seed)

    def is_there(self, client: str, at_s: float) -> bool:
        """See Availability."""
        return self._in_slot(client, int(at_s // self.slot_s))

    def leaves(self, client: str, at_s: float, before_s: float) -> float | None:
        """See Availability."""
        if self.probability[client] == 1:
            return None
        slot = int(at_s // self.slot_s) + 1
        while slot * self.slot_s < before_s:
            if not self._in_slot(client, slot):
                return slot * self.slot_s
            slot += 1
        return None

    def _in_slot(self, client: str, slot: int) -> bool:
        return uniform(self.seed, "world", "slot", client, slot) < self.probability[client]


class DropOuts:
    """Up and down times of a group are exponential; it starts in the long-run share of its states."""

    def __init__(self, section: config.DropOuts, seed: int) -> None:
        self.section = section
        self.seed = seed
        # What follows from the seed alone, written down as far as anybody asked.
        self._switches: dict[int, list[float]] = {}

    def is_there(self, client: str, at_s: float) -> bool:
        """See Availability."""
        group = group_of(self.section.groups, self.seed, client)
        switches = self._until(group, at_s)
        return self._starts_up(group) != bool(bisect_right(switches, at_s) % 2)

    def leaves(self, client: str, at_s: float, before_s: float) -> float | None:
        """See Availability."""
        switches = self._until(group_of(self.section.groups, self.seed, client), at_s)
        away_s = switches[bisect_right(switches, at_s)]
        return away_s if away_s < before_s else None

    def _starts_up(self, group: int) -> bool:
        up_s, down_s = self.section.mean_up_s, self.section.mean_down_s
        return uniform(self.seed, "world", "starts up", group) < up_s / (up_s + down_s)

    def _until(self, group: int, at_s: float) -> list[float]:
        """The times at which a group changes state, at least one of them after `at_s`."""
        switches = self._switches.setdefault(group, [])
        while not switches or switches[-1] <= at_s:
            is_up = self._starts_up(group) != bool(len(switches) % 2)
            mean_s = self.section.mean_up_s if is_up else self.section.mean_down_s
            stay_s = exponential(mean_s, self.seed, "world", "stay", group, len(switches))
            switches.append((switches[-1] if switches else 0.0) + stay_s)
        return switches


class Trace:
    """There in the intervals [from_s, until_s) of a file, which may repeat."""

    def __init__(
        self, intervals: Mapping[str, Sequence[tuple[float, float]]], repeat_s: float | None
    ) -> None:
        """`intervals`: of each client, sorted and apart, within [0, repeat_s]."""
        self.intervals = intervals
        self.repeat_s = repeat_s

    def is_there(self, client: str, at_s: float) -> bool:
        """See Availability."""
        return self._end(client, at_s) is not None

    def leaves(self, client: str, at_s: float, before_s: float) -> float | None:
        """See Availability."""
        end_s = at_s
        while end_s < before_s:
            following = self._end(client, end_s)  # where the trace begins anew, an interval may go on
            if following is None:
                return end_s
            end_s = following
        return None

    def _end(self, client: str, at_s: float) -> float | None:
        """When the interval around `at_s` ends; None if there is none."""
        within_s = at_s if self.repeat_s is None else at_s % self.repeat_s
        held = self.intervals[client]
        index = bisect_right(held, (within_s, math.inf)) - 1
        if index < 0 or held[index][1] <= within_s:
            return None
        # Far from zero the sum may round to where we are.
        return max(at_s - within_s + held[index][1], math.nextafter(at_s, math.inf))


def _probabilities(section: config.Uneven, clients: Sequence[str], seed: int) -> Mapping[str, float]:
    given = section.probability
    if isinstance(given, dict):
        require_all("world.availability.probability", given, clients)
        return given
    a, b = given
    return {client: beta(a, b, seed, "world", "probability", client) for client in clients}
