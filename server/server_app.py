"""The Flower ServerApp of the centre: a config, a grid, a run.

FEDLORA_CONFIG is the path of the run's YAML; FEDLORA_CONFIG_SET may hold `key=value` overrides.
"""

import logging
import os

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config.load import load_config
from fedlora.config.located import located
from fedlora.deploy.server import serve
from fedlora.export.deliver import deliver
from fedlora.runs.rundir import adapters_of, run_rounds
from fedlora.runs.summary import summary_so_far

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The run of FEDLORA_CONFIG is finished, its adapter and report written."""
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("fedlora").setLevel(logging.INFO)
    path, overrides = os.environ["FEDLORA_CONFIG"], os.environ.get("FEDLORA_CONFIG_SET", "").split()
    config = load_config(path, overrides)
    with located(path, overrides):
        run_dir = serve(grid, config)
    deliver(
        run_dir,
        config=config,
        summary=summary_so_far(run_dir),
        rounds=run_rounds(run_dir),
        trained=lambda: adapters_of(run_dir),
        say=logging.getLogger("fedlora").info,
    )
