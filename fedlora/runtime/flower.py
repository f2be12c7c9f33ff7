"""A whole federation on Flower's stock simulation engine: a node for each client, on this machine.

The engine runs in a thread and its ServerApp does nothing but lend us its grid, so that the same round loop
drives it. Setup and records reach its worker processes as files of ours in a private directory of the run: no
pickle, and each worker loads the base model once. A supported path, not a fast one: its cost grows with nodes
times messages, so take `ray` beyond about a hundred clients a round.
"""

import dataclasses
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from flwr.app import Context, Error
from flwr.serverapp import Grid, ServerApp

from fedlora.config.schema import RunConfig
from fedlora.data.holdings import open_holdings
from fedlora.errors import ConfigError, IncompleteError, LedgerError
from fedlora.federation.events import Listener
from fedlora.runtime.cores import usable_cores
from fedlora.runtime.host import Host, HostSetup, Terms
from fedlora.runtime.seats import worker_count
from fedlora.transport.flower_client import Hello, client_app
from fedlora.transport.flower_cohort import FlowerCohort
from fedlora.transport.flower_nodes import Nodes, Watch, meet
from fedlora.values import Mechanism, Reply, Sampling, TrainRequest, Witness

ENGINE_ERROR = 0
"""Flower's code for what no ClientApp and no node did: in simulation, a worker process died."""

SCENE = ".flower"
"""In the run directory, while the engine runs."""

STOP_S = 10.0
"""Seconds that a worker gets to finish its client when the run stops; to stop it under way is safe, too."""


class SimulatedCohort:
    """A Cohort on Flower's simulation engine, which is started and stopped with it."""

    def __init__(self, setup: HostSetup, listener: Listener) -> None:
        """Raises ConfigError where the engine does not start."""
        self._scene = setup.run_dir / SCENE
        self._engine: Queue[Grid | BaseException] = Queue()
        self._stop = threading.Event()
        write_scene(self._scene, setup)
        self._before = _quiet(self._scene)
        clients = len(open_holdings(setup.holdings))
        workers = _workers(setup.config, clients)
        self._thread = threading.Thread(target=self._run, args=(clients, *workers), daemon=True)
        self._thread.start()
        try:
            self._cohort = cohort_on(self._grid(), setup, listener, self._watch)
        except BaseException:
            self.close()
            raise

    def ask(self, clients: Sequence[str], request: TrainRequest) -> Iterator[Reply]:
        """See Cohort."""
        return self._cohort.ask(clients, request)

    def close(self) -> None:
        """See Cohort."""
        import ray  # what the engine started is not stopped by it

        self._stop.set()
        self._thread.join(STOP_S)
        if ray.is_initialized():
            ray.shutdown()
        self._thread.join(STOP_S)
        shutil.rmtree(self._scene, ignore_errors=True)
        logging.getLogger("flwr").setLevel(self._before)

    def _run(self, clients: int, workers: int, threads: int) -> None:
        from flwr.simulation import run_simulation

        server = ServerApp()

        @server.main()
        def lend(grid: Grid, context: Context) -> None:
            self._engine.put(grid)
            self._stop.wait()

        scene = str(self._scene)
        app = client_app(partial(greet, scene), partial(answer, scene))
        resources = {"num_cpus": threads, "num_gpus": 0.0}
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        # Without an address Ray would join any cluster that runs on this machine, and refuse our num_cpus.
        here = {"address": "local", "num_cpus": workers * threads, **quiet}
        backend = {"init_args": here, "client_resources": resources}
        try:
            run_simulation(server, app, clients, backend_config=backend)
        except BaseException as error:
            self._engine.put(error)

    def _grid(self) -> Grid:
        lent = self._engine.get()
        if isinstance(lent, BaseException):
            raise ConfigError(
                f"Flower's simulation engine does not start: {lent}; set runtime.kind to local"
            ) from lent
        return lent

    def _watch(self, error: Error | None) -> None:
        """Raises what a worker may not answer for a client, and when there is nobody left to answer."""
        watch_workers(self._scene, error)
        if (died := self._died()) is not None and not self._stop.is_set():
            raise _stopped(self._scene, died)

    def _died(self) -> str | None:
        try:
            return repr(self._engine.get_nowait())
        except Empty:
            return None if self._thread.is_alive() else "it ended by itself"


def cohort_on(grid: Grid, setup: HostSetup, listener: Listener, watch: Watch) -> FlowerCohort:
    """A cohort of the engine's nodes, once every client of the run has said hello from one of them.

    Raises:
        ConfigError: the engine has more nodes than the run has clients, or fewer.
    """
    sizes = {client: len(held) for client, held in open_holdings(setup.holdings).items()}
    nodes = Nodes(grid, lambda hello: sizes.get(hello.client) == hello.records)

    def ready(hellos: dict[str, Hello]) -> bool:
        # The engine registers all of its nodes before the first of them can answer.
        if hellos and (count := len(list(grid.get_nodes()))) != len(sizes):
            raise ConfigError(
                f"Flower simulates {count} SuperNodes, but the run has {len(sizes)} clients; "
                f"give --federation-config 'num-supernodes={len(sizes)}', or change data.partition"
            )
        return hellos.keys() == sizes.keys()

    meet(nodes, ready, watch)
    federation = setup.config.federation
    return FlowerCohort(
        nodes,
        deadline_s=federation.deadline_s,
        ttl_s=federation.deadline_s * (1 + federation.keep_gauges),
        listener=listener,
        watch=watch,
    )


def watch_workers(scene: Path, error: Error | None) -> None:
    """Raises what a worker may not answer for a client, and when `error` says that a worker is gone."""
    fault = scene / "fault"
    if fault.exists():
        raise LedgerError(fault.read_text())
    if error is not None and error.code == ENGINE_ERROR:
        raise _stopped(scene, "a worker process died, and Flower's engine does not replace it")


def _stopped(scene: Path, why: str) -> IncompleteError:
    return IncompleteError(
        f"Flower's simulation engine stopped: {why}; go on with: fedlora resume {scene.parent}"
    )


def _workers(config: RunConfig, clients: int) -> tuple[int, int]:
    """Worker processes, and cores of each."""
    return min(worker_count(config.runtime, usable_cores()), clients), config.runtime.threads


def _quiet(home: Path) -> int:
    """Flower and Ray say nothing on the terminal and to the network; returns the log level from before."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("FLWR_HOME", str(home / "home"))  # else it leaves an identity in the user's home
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    return before


def write_scene(directory: Path, setup: HostSetup) -> None:
    """`directory`, readable by its owner only, holds all that a worker process needs to be a host."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    words = {
        "config": setup.config.model_dump(mode="json"),
        "run": setup.run,
        "run_dir": str(setup.run_dir),
        "holdings": str(setup.holdings),
        "classes": setup.classes,
        "together": setup.together,
        "terms": {records: dataclasses.asdict(terms) for records, terms in setup.terms.items()},
    }
    (directory / "setup.json").write_text(json.dumps(words))


def read_setup(directory: str) -> HostSetup:
    """What `write_scene` was given."""
    words = json.loads((Path(directory) / "setup.json").read_text())
    return HostSetup(
        config=RunConfig.model_validate_json(json.dumps(words["config"])),
        run=words["run"],
        run_dir=Path(words["run_dir"]),
        holdings=Path(words["holdings"]),
        classes=tuple(words["classes"]),
        terms={int(records): _terms(terms) for records, terms in words["terms"].items()},
        together=words["together"],
    )


def _terms(words: dict[str, Any]) -> Terms:
    mechanism = words["mechanism"]
    return Terms(sampling=Sampling(**words["sampling"]), mechanism=mechanism and Mechanism(**mechanism))


@lru_cache(maxsize=1)
def _host(directory: str) -> Host:
    """The one host of this process."""
    return Host(read_setup(directory))


def _client(host: Host, context: Context) -> str:
    return host.holdings.clients[int(context.node_config["partition-id"])]


def greet(directory: str, context: Context) -> Hello:
    """The hello of the client that this node plays, by its partition-id."""
    host = _host(directory)
    client = _client(host, context)
    return Hello(client=client, records=len(host.holdings[client]), classes=host.setup.classes)


def answer(directory: str, context: Context, frame: bytes, echo: Witness | None) -> bytes:
    """The reply's frame of the client that this node plays.

    Raises:
        LedgerError: its ledger cannot be trusted; `watch_workers` raises it in the driver, too.
    """
    host = _host(directory)
    try:
        return host.answer_frame(_client(host, context), frame)
    except LedgerError as error:
        (Path(directory) / "fault").write_text(str(error))
        raise
