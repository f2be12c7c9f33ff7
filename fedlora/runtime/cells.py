"""Whole simulations side by side: each a Ray task on one core, which simulates its clients in its own process."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError

from fedlora.config.load import require_same
from fedlora.config.schema import RunConfig, Runtime
from fedlora.errors import FedLoraError, without_records
from fedlora.federation.events import Event
from fedlora.runs.rundir import finished_summary, run_config
from fedlora.runtime.cluster import connected, worker_slots
from fedlora.runtime.prepare import Shared
from fedlora.runtime.simulate import resume, simulate

POLL_S = 5.0
"""Seconds between looks at the cluster's head while nothing ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a run: finished, or why not."""

    run_dir: Path
    seconds: float
    error: str | None


def finish_all(
    runs: Sequence[tuple[RunConfig, Path]],
    runtime: Runtime,
    place: Path,
    go_on: str,
    shared: Shared | None = None,
) -> Iterator[Ended]:
    """Each run's directory holds it, finished, as far as that can be; told as they end. One that fails stops no other.

    Args:
        runs: configs and their directories, in the order in which they are to begin. Those begun before go on, and
            finished ones are left alone.
        runtime: where, and how many at once.
        place: the directory around them.
        go_on: what to tell a user to do when Ray is lost.
        shared: of the runs; None: each is by itself.

    Raises:
        ConfigError: there is no Ray to be had.
        IncompleteError: the cluster is lost.
    """
    with connected(runtime, "compare", place, go_on) as vitals:
        # A run whose process dies is told as failed: it may have died of the memory that the next would take too.
        task = ray.remote(num_cpus=1, max_retries=0)(_finish)
        slots, waiting, running = worker_slots(runtime), list(runs), {}
        freed = None
        while waiting or running:
            while waiting and len(running) < slots:
                beside = [kin for kin, _, _ in running.values()]
                config, run_dir = waiting.pop(next_of([_kin(config) for config, _ in waiting], freed, beside))
                running[task.remote(config, run_dir, shared)] = (_kin(config), run_dir, time.monotonic())
            vitals.require_head()
            for ref in ray.wait(list(running), num_returns=1, timeout=POLL_S)[0]:
                freed, run_dir, began = running.pop(ref)
                yield Ended(run_dir=run_dir, seconds=time.monotonic() - began, error=_error(ref))


def next_of(waiting: Sequence[object], freed: object, beside: Sequence[object]) -> int:
    """Which of the waiting a process that has just finished one of `freed` is to begin.

    The first of the same kind, for which it remembers how much noise each client needs and what that costs: seconds,
    and most of them the same in all arms. Else the first that no process beside is at; else the first.
    """
    own = (place for place, kind in enumerate(waiting) if kind == freed)
    others = (place for place, kind in enumerate(waiting) if kind not in beside)
    return next(own, next(others, 0))


def _kin(config: RunConfig) -> tuple[int, float | None]:
    """What decides the noise of a run's clients within a comparison: their sizes, by the seed, and the budget."""
    return config.seed, None if config.privacy == "none" else config.privacy.target_epsilon


def _error(ref: object) -> str | None:
    try:
        return ray.get(ref)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except RayError as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"its process died ({type(error).__name__}: {first})"


def _finish(config: RunConfig, run_dir: Path, shared: Shared | None) -> str | None:
    """In a task: the run is finished. What failed, in words that hold no record; None: nothing."""
    threads = config.runtime.threads
    try:
        if not (run_dir / "config.yaml").exists():
            simulate(config, run_dir, _unheard, scoring_threads=threads, shared=shared)
            return None
        require_same(run_config(run_dir), config, run_dir)
        if finished_summary(run_dir) is None:
            resume(run_dir, _unheard, scoring_threads=threads, shared=shared)
    except FedLoraError as error:
        return str(error)
    except Exception as error:
        return f"unexpected: {without_records(error)}"
    return None


def _unheard(event: Event) -> None:
    """Nobody listens inside a task."""
