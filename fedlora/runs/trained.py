"""What a run has trained so far. Apart from the rest of a run directory, which is read without torch."""

from pathlib import Path

from fedlora.federation.store import Store
from fedlora.runs.beginning import require_beginning
from fedlora.runs.inputs import require_base
from fedlora.runs.rundir import load_classes, run_config
from fedlora.values import Adapters


def trained_adapters(run_dir: Path) -> tuple[Adapters, tuple[str, ...]]:
    """The newest adapters and the class names of a run.

    Raises:
        ConfigError: no run is there, or it is damaged; or its base model, or the adapter that it began from and that
            its model needs, holds other files now.
    """
    config = run_config(run_dir)
    require_base(config, run_dir)
    # A classifier's head or pooler may have come whole from there; of a causal model all that did is in A and B.
    if not config.task.causal:
        require_beginning(config, run_dir)
    state, _ = Store(run_dir).load()
    return state.adapters, load_classes(run_dir)
