"""Simulated clients on a pool of Ray actors, fed with groups of clients so that none waits for this process.

An actor that dies is replaced and its clients asked again; the request is idempotent, so nothing is spent twice.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError

from fedlora.algebra.deltas import trainable
from fedlora.algebra.flat import Layout
from fedlora.data.holdings import open_holdings
from fedlora.federation.events import ClientDone, Listener, Stage, outcome
from fedlora.runtime.cluster import connected, store_bytes, worker_slots
from fedlora.runtime.crew import Crew, Ended, failed
from fedlora.runtime.host import HostSetup
from fedlora.runtime.jobs import MOST_CLIENTS, Job, Queue, cut, expected_tokens, singles
from fedlora.runtime.parcel import Parcel, pack_request, unpack_replies
from fedlora.runtime.probe import peaks_of
from fedlora.runtime.seats import Seat, anywhere, gpu_nodes, on_cards
from fedlora.values import Refusal, RefusalReason, Reply, TrainRequest

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times a client is asked in one round before its absence is recorded."""
DEPTH = 2
"""Jobs of one worker: one in work, one that it finds when it is done, without asking here first."""
POLL_S = 5.0
"""Seconds between looks at workers that have not begun."""
PARCEL_BYTES = 16 << 20
"""Updates of one job, about; this process touches so much of the object store at a time."""
WINDOW_BYTES = 256 << 20
"""Updates that wait for their turn, about. Below it the longest job comes first; beyond it nothing is begun."""
SPREAD = 8
"""Parcels of each worker that the window has room for at least."""


class RayCohort:
    """A Cohort of actors, on an existing cluster or one started here for the run.

    On a cluster of several machines the run directory, which holds the ledgers, must be on a file system they share.
    """

    def __init__(self, setup: HostSetup, listener: Listener) -> None:
        config = setup.config
        self._listener = listener
        self._run_dir = setup.run_dir
        self._batch_size = config.federation.batch_size
        self._together = setup.together
        self._holdings = open_holdings(setup.holdings)
        self._open = ExitStack()
        with ExitStack() as opening:
            vitals = opening.enter_context(connected(config.runtime, setup.run, setup.run_dir))
            try:
                seats = _seats(setup, max(1, len(self._holdings)))
                self._window = min(WINDOW_BYTES, store_bytes() // 4)
                self._crew = Crew(setup, seats, lambda words: listener(Stage(name=words)), vitals)
            except (RayError, ConnectionError) as error:
                raise failed(error, self._run_dir) from error
            opening.callback(self._crew.close)
            self._open = opening.pop_all()

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort. The replies come in the order of `clients`; one group of them is held at a time."""
        try:
            asking = _Asking(
                crew=self._crew,
                clients=clients,
                request=request,
                costs=expected_tokens(self._holdings, clients, self._batch_size).tolist(),
                together=self._together,
                window_bytes=self._window,
            )
            for reply in asking.replies():
                self._listener(ClientDone(round=request.round, client=reply.client, outcome=outcome(reply)))
                yield reply
        except (RayError, ConnectionError) as error:
            raise failed(error, self._run_dir) from error
        finally:
            self._crew.drop_jobs()

    def close(self) -> None:
        """See Cohort."""
        self._open.close()


def _seats(setup: HostSetup, clients: int) -> list[Seat]:
    runtime = setup.config.runtime
    if runtime.device == "cpu":
        return anywhere(runtime, min(worker_slots(runtime), clients))
    nodes = gpu_nodes(ray.nodes())
    return on_cards(nodes, peaks_of(nodes, setup), runtime, clients)


class _Asking:
    """One request on its way through a cohort."""

    def __init__(
        self,
        *,
        crew: Crew,
        clients: Sequence[str],
        request: TrainRequest,
        costs: Sequence[float],
        together: int,
        window_bytes: int,
    ) -> None:
        self._crew = crew
        self._clients = clients
        self._request = request
        self._together = together
        self._layout = Layout.of(trainable(request.adapters, request.work.side))
        packed = pack_request(request)
        update_bytes = max(1, self._layout.numbers * packed[1].itemsize)
        workers = max(1, len(crew.workers))
        most = max(
            1, min(MOST_CLIENTS, min(PARCEL_BYTES, window_bytes // (SPREAD * workers)) // update_bytes)
        )
        jobs = cut(costs, workers=workers, most=most, exactly=together)
        self._queue = Queue(jobs)
        self._reach = max(window_bytes // update_bytes, DEPTH * workers * max(most, together))
        self._name = uuid4().hex
        self._parcel: Any = ray.put(packed)
        self._finished: dict[int, tuple[Job, Parcel | None]] = {}

    def replies(self) -> Iterator[Reply]:
        """Everybody's, in the order of the clients."""
        due = 0
        while due < len(self._clients):
            self._hand_out(due)
            for ended in self._crew.wait(0 if due in self._finished else POLL_S):
                self._note(ended)
            if due in self._finished:
                self._hand_out(due)
                job, parcel = self._finished.pop(due)
                due = job.stop
                yield from self._unpacked(job, parcel)
                parcel = None  # its memory goes back to the store

    def _unpacked(self, job: Job, parcel: Parcel | None) -> Iterator[Reply]:
        if parcel is not None:
            yield from unpack_replies(parcel, self._layout)
            return
        for client in self._clients[job.start : job.stop]:
            asked = self._request
            yield Refusal(client=client, run=asked.run, round=asked.round, reason=RefusalReason.FAILED)

    def _hand_out(self, due: int) -> None:
        """Every worker has work, up to the end of the window; near the end of the round no second job in store."""
        while True:
            depth = DEPTH if len(self._queue) > DEPTH * len(self._crew.workers) else 1
            worker = self._crew.free(depth)
            job = self._queue.take(due + self._reach) if worker is not None else None
            if worker is None or job is None:
                return
            clients = list(self._clients[job.start : job.stop])
            self._crew.hand(worker, job, clients, self._name, self._parcel)

    def _note(self, ended: Ended) -> None:
        for job, parcel in ended.done:
            self._finished[job.start] = (job, parcel)
        for job in ended.again:
            self._queue.put_back(job)
        if ended.suspect is not None:
            self._suspect(replace(ended.suspect, deaths=ended.suspect.deaths + 1))

    def _suspect(self, job: Job) -> None:
        """A worker died with it: once more, client by client; three deaths are refusals.

        Clients that run together are asked together once more, since apart their results differ in the last bits.
        When a second worker has died with them, one of them is likely to blame: losing the others would move the
        model by more, and whoever kills every worker parts them in every repetition of the run, so bits still agree.
        """
        clients = self._clients[job.start : job.stop]
        if job.deaths >= ATTEMPTS:
            log.error("%d workers died with %s", job.deaths, clients)
            self._finished[job.start] = (job, None)
        elif self._together > 1 and job.deaths < ATTEMPTS - 1:
            self._queue.put_back(job)
        else:
            if self._together > 1:
                log.error("%d workers died with %s; one by one now: last bits differ", job.deaths, clients)
            for single in singles(job):
                self._queue.put_back(single)
