"""Simulated clients on a pool of Ray actors: each loads the base model once and plays one client after the other.

An actor that dies is replaced and its client asked again; the request is idempotent, so nothing is spent twice.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from fedlora.config.schema import Runtime
from fedlora.errors import ConfigError, FedLoraError
from fedlora.federation.events import ClientDone, Listener, outcome
from fedlora.runtime.host import Host, HostSetup, worker_count
from fedlora.values import Refusal, RefusalReason, Reply, TrainRequest

ATTEMPTS = 3
"""Times a client is asked in one round before its absence is recorded."""


class RayCohort:
    """A Cohort of `workers` actors, on an existing cluster or one started here for the run.

    On a cluster of several machines the run directory, which holds the ledgers, must be on a file system they share.
    """

    def __init__(self, setup: HostSetup, listener: Listener) -> None:
        runtime = setup.config.runtime
        self.started_here = not ray.is_initialized()
        if self.started_here:
            _connect(runtime)
        workers = worker_count(runtime, int(ray.cluster_resources().get("CPU", 1)))
        self.listener = listener
        self.run = setup.run
        self.setup = ray.put(setup)
        self.actor = ray.remote(num_cpus=runtime.threads)(Host)
        self.idle: list[Any] = [self._worker() for _ in range(workers)]

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort."""
        asked = ray.put(request)
        waiting = [(client, 1) for client in reversed(clients)]
        busy: dict[Any, tuple[Any, str, int]] = {}
        while waiting or busy:
            while waiting and self.idle:
                client, attempt = waiting.pop()
                worker = self.idle.pop()
                busy[worker.answer.remote([client], asked)] = (worker, client, attempt)
            (done,), _ = ray.wait(list(busy), num_returns=1)
            worker, client, attempt = busy.pop(done)
            try:
                (reply,) = ray.get(done)
                self.idle.append(worker)
            except (RayActorError, OutOfMemoryError):
                self.idle.append(self._worker())
                if attempt < ATTEMPTS:
                    waiting.append((client, attempt + 1))
                    continue
                reply = Refusal(client=client, run=self.run, round=request.round, reason=RefusalReason.FAILED)
            except RayTaskError as error:
                raise _cause(error) from None
            self.listener(ClientDone(round=request.round, client=client, outcome=outcome(reply)))
            yield reply

    def close(self) -> None:
        """See Cohort."""
        if self.started_here:
            ray.shutdown()

    def _worker(self) -> Any:
        return self.actor.remote(self.setup)


def _connect(runtime: Runtime) -> None:
    address, cores = runtime.address, worker_count(runtime, os.cpu_count() or 1) * runtime.threads
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    environment = {"OMP_NUM_THREADS": str(runtime.threads), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address is None:
            ray.init(num_cpus=cores, **quiet, runtime_env={"env_vars": environment})
        else:
            ray.init(address=address, logging_level=logging.ERROR, runtime_env={"env_vars": environment})
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this machine" if address is None else f"at runtime.address {address!r}"
        raise ConfigError(
            f"no Ray cluster {where}: {error}; start one, or set runtime.kind to local"
        ) from error


def _cause(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, FedLoraError) else FedLoraError(f"a Ray worker failed: {cause}")
