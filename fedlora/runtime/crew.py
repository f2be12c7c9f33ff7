"""The Ray actors of a run: each loads the base model once; who dies is replaced, and the others work on meanwhile."""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedlora.algebra.deltas import trainable
from fedlora.algebra.flat import Layout
from fedlora.errors import ConfigError, FedLoraError, IncompleteError
from fedlora.runtime.host import Host, HostSetup
from fedlora.runtime.jobs import Job
from fedlora.runtime.parcel import Parcel, pack_replies, unpack_request
from fedlora.runtime.seats import Seat
from fedlora.runtime.vitals import Vitals
from fedlora.values import TrainRequest

log = logging.getLogger(__name__)

GONE = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError, ObjectLostError)
"""What Ray raises for work whose process or machine is no more: somebody else can do it."""
PLACE_S = 60.0
"""Seconds after which a worker that no node takes is spoken of."""
ROOM_S = 300.0
"""Seconds in which the cluster must have room for one worker at least; then the run ends."""
STARTS = 3
"""Times that a worker's process may die before it has ever begun; then its place is given up."""
DEAD_S = 30.0
"""Seconds in which Ray must know the fate of a dead worker's other jobs."""
SIGN = "token"
"""Beside the clients' records; a worker that reads it there sees this run's directory."""


class HostActor:
    """What runs in an actor: a host that is handed parcels."""

    def __init__(self) -> None:
        self._host: Host | None = None
        self._asked: tuple[str, TrainRequest, Layout] | None = None

    def placed(self) -> str:
        """The node that has room for it."""
        return ray.get_runtime_context().get_node_id()

    def begin(self, setup: HostSetup, token: str) -> None:
        """The base model is loaded.

        Raises:
            ConfigError: this machine does not see the run's directory.
        """
        path = setup.holdings / SIGN
        if not path.exists() or path.read_text() != token:
            raise ConfigError(
                f"{socket.gethostname()} does not see the run directory {setup.run_dir} of the machine that started "
                "the run; put `output` on a file system that all machines of the cluster share, at the same path"
            )
        self._host = Host(setup)

    def answer(self, clients: Sequence[str], name: str, parcel: Parcel) -> Parcel:
        """Their replies to the request in the parcel, which is read once for all jobs that give it this name."""
        if self._asked is None or self._asked[0] != name:
            request = unpack_request(parcel)
            self._asked = (name, request, Layout.of(trainable(request.adapters, request.work.side)))
        assert self._host is not None
        _, request, layout = self._asked
        return pack_replies(self._host.answer(clients, request), layout)


@dataclass(slots=True, eq=False)
class Worker:
    """One actor and its jobs, the one in work first.

    placed: ready once a node has it. beginning: None once it has loaded the model.
    """

    seat: Seat
    actor: Any
    placed: Any
    beginning: Any | None
    since: float
    starts: int = 1
    jobs: dict[Any, Job] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of jobs: parcels of replies, what to ask anew, and the job that a worker died with."""

    done: Sequence[tuple[Job, Parcel]] = ()
    again: Sequence[Job] = ()
    suspect: Job | None = None


class Crew:
    """A worker in each seat, as far as the cluster has room for them."""

    def __init__(
        self,
        setup: HostSetup,
        seats: Sequence[Seat],
        say: Callable[[str], None],
        vitals: Vitals,
        *,
        room_s: float = ROOM_S,
    ) -> None:
        self._setup = ray.put(setup)
        self._run_dir = setup.run_dir
        self._token = uuid4().hex
        (setup.holdings / SIGN).write_text(self._token)
        self._say = say
        self._room_s = room_s
        self._vitals = vitals
        threads = setup.config.runtime.threads
        card = " and a part of a GPU" if setup.config.runtime.device == "cuda" else ""
        self._wanted = f"{threads} free core{'' if threads == 1 else 's'}{card}"
        self._actor: Any = ray.remote(HostActor)
        self._said = False
        self.workers = [self._worker(seat) for seat in seats]

    def _worker(self, seat: Seat, starts: int = 1) -> Worker:
        where = "SPREAD" if seat.node is None else NodeAffinitySchedulingStrategy(seat.node, soft=True)
        options = {"num_cpus": seat.cpus, "num_gpus": seat.gpus, "scheduling_strategy": where}
        actor = self._actor.options(**options).remote()
        placed, beginning = actor.placed.remote(), actor.begin.remote(self._setup, self._token)
        return Worker(
            seat=seat, actor=actor, placed=placed, beginning=beginning, since=time.monotonic(), starts=starts
        )

    def free(self, depth: int) -> Worker | None:
        """The worker with the fewest jobs, if it has begun and has fewer than `depth`."""
        ready = [worker for worker in self.workers if worker.beginning is None]
        least = min(ready, key=lambda worker: len(worker.jobs), default=None)
        return least if least is not None and len(least.jobs) < depth else None

    def hand(self, worker: Worker, job: Job, clients: Sequence[str], name: str, parcel: Any) -> None:
        """The job is the worker's, behind those it has."""
        worker.jobs[worker.actor.answer.remote(clients, name, parcel)] = job

    def drop_jobs(self) -> None:
        """Nobody waits for a reply any more; what is in work is finished and forgotten."""
        for worker in self.workers:
            worker.jobs.clear()

    def close(self) -> None:
        """The actors are gone, whatever they do."""
        for worker in self.workers:
            ray.kill(worker.actor)
        self.workers = []

    def wait(self, patience_s: float) -> list[Ended]:
        """What ended by now, or, if nothing has, first within `patience_s` seconds.

        Raises:
            FedLoraError: what a host raised.
            IncompleteError: Ray itself failed, or there is no worker any more, or room for none.
        """
        self._vitals.require_head()
        owners = {ref: worker for worker in self.workers for ref in self._watched(worker)}
        refs = list(owners)
        if not refs:
            return []
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        if not ready and patience_s:
            ready, _ = ray.wait(refs, num_returns=1, timeout=patience_s)
        if not ready:
            self._look_for_room()
        return [ended for ref in ready if (ended := self._ended(owners[ref], ref)) is not None]

    def _watched(self, worker: Worker) -> list[Any]:
        return list(worker.jobs) if worker.beginning is None else [worker.beginning]

    def _ended(self, worker: Worker, ref: Any) -> Ended | None:
        if worker not in self.workers:  # it was found dead a moment ago, and its jobs were seen to
            return None
        try:
            found = self._fetch(ref)
        except GONE as error:
            return self._buried(worker, error)
        if worker.beginning is not None:
            worker.beginning, worker.starts = None, 1
            return None
        return Ended(done=[(worker.jobs.pop(ref), found)])

    def _fetch(self, ref: Any, timeout_s: float | None = None) -> Any:
        try:
            return ray.get(ref, timeout=timeout_s)
        except GONE:
            raise
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FedLoraError):
                raise cause from None
            if isinstance(cause, RayError):
                raise failed(cause, self._run_dir) from error
            raise FedLoraError(f"a Ray worker failed: {cause}") from None
        except RayError as error:
            raise failed(error, self._run_dir) from error

    def _buried(self, worker: Worker, error: RayError) -> Ended:
        """Somebody stands in its place. Of its jobs, those it had finished count; it died with the first other."""
        log.warning("a Ray worker died (%s); it is replaced", type(error).__name__)
        # One that is only out of reach must not write to a ledger beside its successor.
        ray.kill(worker.actor)
        place, starts = self.workers.index(worker), worker.starts + (worker.beginning is not None)
        done: list[tuple[Job, Parcel]] = []
        lost: list[Job] = []
        for ref, job in worker.jobs.items():
            try:
                done.append((job, ray.get(ref, timeout=DEAD_S if not lost else 0)))
            except RayError:
                lost.append(job)
        if starts > STARTS:
            del self.workers[place]
            self._say(f"a Ray worker died {STARTS} times as it began; going on with {len(self.workers)}")
        else:
            self.workers[place] = self._worker(worker.seat, starts)
        if not self.workers:
            raise failed(error, self._run_dir)
        return Ended(done=done, again=lost[1:], suspect=lost[0] if lost else None)

    def _look_for_room(self) -> None:
        waiting = [worker for worker in self.workers if worker.beginning is not None]
        placed = set(ray.wait([worker.placed for worker in waiting], num_returns=len(waiting), timeout=0)[0])
        homeless = [time.monotonic() - worker.since for worker in waiting if worker.placed not in placed]
        late = sum(waited_s > PLACE_S for waited_s in homeless)
        if late and not self._said:
            self._said = True
            here = len(self.workers) - len(homeless)
            then = f"going on with {here}" if here else "waiting for the first"
            self._say(f"{late} of {len(self.workers)} Ray workers have not begun yet; {then}")
        if len(homeless) == len(self.workers) and min(homeless) > self._room_s:
            raise IncompleteError(
                f"no worker began in {self._room_s:.0f} s: no node of the Ray cluster had {self._wanted} "
                "(runtime.threads; `ray status` shows who has them), or its cores are too busy (runtime.kind: local "
                "needs no workers); every finished round is kept, "
                f"go on with: fedlora resume {self._run_dir}"
            )


def failed(error: Exception, run_dir: Path) -> IncompleteError:
    """What ends the run when Ray fails it: the cause, and how to go on."""
    first = (str(error).strip().splitlines() or [""])[0]
    return IncompleteError(
        f"Ray failed ({type(error).__name__}: {first}); every finished round is kept, "
        f"go on with: fedlora resume {run_dir}"
    )
