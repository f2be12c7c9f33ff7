"""What a run has trained so far. Apart from the rest of a run directory, which is read without torch."""

import json
from pathlib import Path

from fedlora.errors import ConfigError
from fedlora.federation.store import Store
from fedlora.runs.beginning import require_beginning
from fedlora.runs.rundir import run_config
from fedlora.values import Adapters


def trained_adapters(run_dir: Path) -> tuple[Adapters, tuple[str, ...]]:
    """The newest adapters and the class names of a run.

    Raises:
        ConfigError: no run is there, or it is damaged; or its model needs the adapter that it began from, which holds
            other files now.
    """
    config = run_config(run_dir)
    # A classifier's head or pooler may have come whole from there; of a causal model all that did is in A and B.
    if not config.task.causal:
        require_beginning(config, run_dir)
    state, _ = Store(run_dir).load()
    path = run_dir / "classes.json"
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, no UTF-8
        raise ConfigError(f"{path} is damaged ({str(error).splitlines()[0]}); restore it") from None
    return state.adapters, tuple(classes)
