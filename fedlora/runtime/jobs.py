"""Which clients a worker is handed at a time, and in which order. No Ray here."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from fedlora.data.holdings import Holdings

MOST_CLIENTS = 64
"""Clients of one job: by then what Ray takes for a call, about a millisecond, is spread thin enough."""
SHARE = 4
"""A job is at most this part of what each worker still has before it, so that all end at about the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The clients from place `start` to `stop` of a cohort. cost: expected tokens. deaths: workers lost to it."""

    start: int
    stop: int
    cost: float
    deaths: int = 0


def expected_tokens(holdings: Holdings, clients: Sequence[str], batch_size: int) -> NDArray[np.float64]:
    """What a step of each client is expected to read: its records' mean length times its batch, (clients,).

    Raises:
        KeyError: somebody holds no records here.
    """
    bounds, offsets = holdings.bounds, holdings.examples.offsets
    places = np.array([holdings.place(client) for client in clients], dtype=np.int64)
    records = np.maximum(np.diff(bounds)[places], 1)
    tokens = offsets[bounds[places + 1]] - offsets[bounds[places]]
    return tokens / records * np.minimum(batch_size, records)


def cut(costs: Sequence[float], *, workers: int, most: int, exactly: int = 1) -> list[Job]:
    """The cohort as runs of consecutive clients: large ones first, single clients at the end.

    Args:
        costs: of each client.
        workers: what a job's share is reckoned by; nothing else depends on it.
        most: clients of one job.
        exactly: above 1, every job has so many (the last one what is left), whatever the workers.
    """
    if exactly > 1:
        starts = range(0, len(costs), exactly)
        return [_job(costs, start, min(start + exactly, len(costs))) for start in starts]
    jobs: list[Job] = []
    left, start = float(sum(costs)), 0
    while start < len(costs):
        share, cost, stop = left / (SHARE * workers), costs[start], start + 1
        while stop < len(costs) and stop - start < most and cost + costs[stop] <= share:
            cost, stop = cost + costs[stop], stop + 1
        jobs.append(Job(start=start, stop=stop, cost=float(cost)))
        left, start = left - cost, stop
    return jobs


def singles(job: Job) -> list[Job]:
    """Its clients, one job each, after a worker died with it: only one of them may be to blame."""
    places = range(job.start, job.stop)
    cost = job.cost / len(places)
    return [Job(start=place, stop=place + 1, cost=cost, deaths=job.deaths) for place in places]


def _job(costs: Sequence[float], start: int, stop: int) -> Job:
    return Job(start=start, stop=stop, cost=float(sum(costs[start:stop])))


class Queue:
    """Jobs that nobody has yet: the longest first, among those that begin before a given place.

    The place keeps the replies that wait for their turn few: a window slides over the cohort.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._beyond = list(reversed(jobs))
        self._within: list[tuple[float, int, Job]] = []

    def __len__(self) -> int:
        return len(self._beyond) + len(self._within)

    def take(self, before: int) -> Job | None:
        """The next job, no longer waiting; None if none begins before that place."""
        while self._beyond and self._beyond[-1].start < before:
            job = self._beyond.pop()
            heappush(self._within, (-job.cost, job.start, job))
        return heappop(self._within)[2] if self._within else None

    def put_back(self, job: Job) -> None:
        """It comes before all that were never handed out: others' replies may be waiting for its own."""
        heappush(self._within, (-float("inf"), job.start, job))
