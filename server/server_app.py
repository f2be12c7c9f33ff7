"""The Flower ServerApp of the centre: a config, a grid, a run.

FEDLORA_CONFIG is the path of the run's YAML; FEDLORA_CONFIG_SET may hold `key=value` overrides. Without FEDLORA_CONFIG
the run is a simulation, of the config that Flower's run config names.
"""

import logging
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config.load import load_config
from fedlora.config.located import located
from fedlora.deploy.server import serve
from fedlora.export.deliver import deliver, delivering
from fedlora.runtime.flwr_run import named, simulate_on

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The run is finished, its adapter and report written."""
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("fedlora").setLevel(logging.INFO)
    path, overrides = os.environ.get("FEDLORA_CONFIG"), os.environ.get("FEDLORA_CONFIG_SET", "").split()
    if simulated := path is None:
        path, overrides = named(context.run_config)
    config, say = load_config(path, overrides), logging.getLogger("fedlora").info
    with located(path, overrides):
        stored = delivering(Path(config.output), config, say)
        run_dir = simulate_on(grid, config, stored) if simulated else serve(grid, config, stored)
    deliver(run_dir, say)
