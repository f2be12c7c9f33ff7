"""The Flower ServerApp of the centre: a config, a grid, a run.

FEDLORA_CONFIG is the path of the run's YAML; FEDLORA_CONFIG_SET may hold `key=value` overrides.
"""

import logging
import os

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.cli.run import deliver
from fedlora.config.load import load_config
from fedlora.runtime.server import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The run of FEDLORA_CONFIG is finished, its adapter and report written."""
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("fedlora").setLevel(logging.INFO)
    config = load_config(os.environ["FEDLORA_CONFIG"], os.environ.get("FEDLORA_CONFIG_SET", "").split())
    run_dir = serve(grid, config)
    deliver(run_dir, lambda event: None)
