"""This process's connection to a Ray cluster: one started here for the run, or one that is there already."""

import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray

import fedlora
from fedlora.config.schema import Runtime
from fedlora.errors import ConfigError
from fedlora.interrupts import sigterm_as_ctrl_c
from fedlora.runtime.cores import usable_cores
from fedlora.runtime.seats import worker_count
from fedlora.runtime.vitals import Vitals

REACH_S = 10.0
"""Seconds that a cluster's head may take to be reached; Ray itself tries for minutes."""
STARTS = 3
"""Times that Ray is started on this machine before it is said not to start."""
HEADLESS_S = 600
"""Seconds that Ray tries to reach a head that is gone before it aborts this process; whoever waits for workers looks
sooner, and ends the run with a message."""
_HANDED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM")
"""What a worker needs of this process's environment to find the same base model."""


@contextmanager
def connected(runtime: Runtime, run: str, run_dir: Path, go_on: str | None = None) -> Iterator[Vitals]:
    """Ray can be used, in a namespace of this run's own, and is watched; afterwards it is as it was before.

    SIGTERM within ends the run as Ctrl-C does, so that no process stays behind; Ray's own handler would exit with 15.

    Args:
        runtime: of the config.
        run: its name.
        run_dir: its directory.
        go_on: what to do when Ray is lost; None: resume the run.

    Raises:
        ConfigError: no cluster can be started, or none answers at runtime.address.
    """
    if ray.is_initialized():
        with closing(Vitals(run_dir, go_on=go_on)) as vitals:
            yield vitals
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEADLESS_S))
    with sigterm_as_ctrl_c():
        try:
            _connect(runtime, f"{run}-{uuid.uuid4().hex[:8]}")
            with sigterm_as_ctrl_c(), closing(Vitals(run_dir, go_on=go_on)) as vitals:  # Ray brought its own
                yield vitals
        finally:
            ray.shutdown()


def _connect(runtime: Runtime, namespace: str) -> None:
    if runtime.address is None:
        _start(runtime, namespace)
    else:
        _join(runtime, runtime.address, namespace)


def _start(runtime: Runtime, namespace: str) -> None:
    # A process of Ray's that is forked beside live gRPC may die before it has written a line (fedlora/__init__.py), if
    # gRPC was imported before us; Ray notices half a minute later.
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(**_here(runtime), namespace=namespace)
            return
        except Exception as error:  # of no class of its own when the raylet is the one that died
            ray.shutdown()  # of what did come up
            if attempt == STARTS:
                raise ConfigError(
                    f"Ray does not start on this machine, tried {STARTS} times: {error}; "
                    "set runtime.kind to local, or look at the logs of its newest session"
                ) from error


def _join(runtime: Runtime, address: str, namespace: str) -> None:
    try:
        if ":" in address:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
        ray.init(**_there(address, _environment(runtime)), namespace=namespace)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at runtime.address {address!r}: {error}; "
            f"start one (ray start --head) or mend the address"
        ) from error


def _here(runtime: Runtime) -> dict[str, Any]:
    cores = worker_count(runtime, usable_cores()) * runtime.threads
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    # As nice as the run itself: at Ray's own 15 workers hardly move where a machine is busy.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Without an address Ray would join any cluster that runs on this machine, and refuse our num_cpus.
    return {
        "address": "local",
        "num_cpus": cores,
        **quiet,
        "runtime_env": {"env_vars": _environment(runtime)},
    }


def _there(address: str, variables: dict[str, str]) -> dict[str, Any]:
    # Every machine runs this fedlora, whichever it has; all else must be installed there.
    package = str(Path(fedlora.__file__).parent)
    environment = {"env_vars": variables, "py_modules": [package]}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    return {"address": address, **quiet, "runtime_env": environment}


def _environment(runtime: Runtime) -> dict[str, str]:
    handed_on = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    return {**handed_on, "OMP_NUM_THREADS": str(runtime.threads), "RAY_USAGE_STATS_ENABLED": "0"}


def worker_slots(runtime: Runtime) -> int:
    """Workers that the config asks for: a number, or as many as each node's cores can carry."""
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return worker_count(runtime, runtime.threads * sum(int(cores // runtime.threads) for cores in nodes))


def store_bytes() -> int:
    """Room in the smallest object store of the cluster."""
    return int(min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]))
