"""MLflow: a run of the experiment MLFLOW_EXPERIMENT_NAME, or `fedlora`, in the store that MLFLOW_TRACKING_URI names.

Without that variable it is MLflow's own choice, a database in the directory where the command was given.
"""

import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fedlora.tracking.figures import flat
from fedlora.tracking.tracker import Opened, Tracked

MOST_CHARACTERS = 500
"""Of a parameter: what every version and store takes."""
MOST_AT_ONCE = 100
"""Parameters in one call, MLflow's own limit."""
IN_EVERY_ROUND = "seconds"


def open_mlflow(run_dir: Path, config: dict[str, Any], have: Tracked) -> Opened:
    """See `tracker.Open`. MLflow's own reports of its use are off, unless the environment says otherwise."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow, entities = import_module("mlflow"), import_module("mlflow.entities")
    client = mlflow.MlflowClient()
    try:
        client.update_run(have.run, status="RUNNING")
    except mlflow.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        run = client.create_run(_experiment(client), run_name=run_dir.name)
        have = Tracked(run=run.info.run_id)
        words = [entities.Param(key, str(value)[:MOST_CHARACTERS]) for key, value in flat(config).items()]
        for start in range(0, len(words), MOST_AT_ONCE):
            client.log_batch(have.run, params=words[start : start + MOST_AT_ONCE])
    steps = [metric.step for metric in client.get_metric_history(have.run, IN_EVERY_ROUND)]
    # What a process told that died before it could mark it.
    return _Mlflow(client, have.run, entities.Metric), Tracked(run=have.run, told=max([have.told, *steps]))


def _experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedlora")
    found = client.get_experiment_by_name(name)
    return client.create_experiment(name) if found is None else found.experiment_id


class _Mlflow:
    def __init__(self, client: Any, run: str, metric: Any) -> None:
        self._client = client
        self._run = run
        self._metric = metric

    def round(self, number: int, found: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, number) for name, value in found.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self, summary: Mapping[str, Any]) -> None:
        for name, value in summary.items():
            self._client.set_tag(self._run, f"fedlora.{name}", str(value))

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run, status="FINISHED" if finished else "KILLED")
