"""The peer: Flower's own simulation engine with its own FedAvg, as Flower documents it.

    python -m at_scale.stock MATERIAL SCRATCH

All that is trained travels as one flat array each way, since Flower's cost is per array. Nothing here loads torch, so
that the driver's memory is Flower's.
"""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from at_scale.cases import ACTORS, Case, case_of
from at_scale.stock_client import app


def main(material: Path, scratch: Path) -> None:
    """SCRATCH/times.json, as ours."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    case = case_of(json.loads((scratch / "case.json").read_text()))
    numbers = json.loads((material / "trained.json").read_text())
    stamps: list[float] = []
    answered: list[int] = []
    server = ServerApp()

    @server.main()
    def rounds(grid: Grid, context: Context) -> None:
        _strategy(case, answered).start(
            grid,
            ArrayRecord({"trained": Array(np.zeros(numbers, dtype=np.float32))}),
            num_rounds=case.rounds,
            evaluate_fn=lambda number, arrays: stamps.append(time.monotonic()),
        )

    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    backend = {"init_args": {"num_cpus": ACTORS, **quiet}, "client_resources": resources}
    run_simulation(server, app, case.clients, backend_config=backend)
    found = {"stamps": stamps, "answered": answered, "spans": []}
    (scratch / "times.json").write_text(json.dumps(found))


def _strategy(case: Case, answered: list[int]) -> FedAvg:
    """Everybody, or as many as are asked, in every round; Flower's own sum of lists of arrays."""

    def count(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        answered.append(len(contents))
        return MetricRecord({"answered": len(contents)})

    return FedAvg(
        fraction_train=case.asked / case.clients,
        fraction_evaluate=0.0,
        min_train_nodes=case.asked,
        min_available_nodes=case.clients,
        train_metrics_aggr_fn=count,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
