"""Weights & Biases: a run of the project WANDB_PROJECT, or `fedlora`. WANDB_MODE=offline keeps it in RUN_DIR/wandb."""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fedlora.tracking.tracker import Opened, Tracked

PATIENCE_S = 60.0
"""For the first answer of the service."""


def open_wandb(run_dir: Path, config: dict[str, Any], have: Tracked) -> Opened:
    """See `tracker.Open`. Of this machine nothing is told: no code, no packages, no terminal, no load, no errors."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of crashes, to the makers of wandb
    wandb = import_module("wandb")

    settings = wandb.Settings(
        console="off",
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        silent=True,
        init_timeout=PATIENCE_S,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fedlora"),
        id=have.run,
        name=run_dir.name,
        resume="allow",
        reinit="create_new",  # a run that the process has open besides is not ours to write to, or to finish
        dir=str(run_dir),
        config=config,
        settings=settings,
    )
    return _Wandb(run), have


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def round(self, number: int, found: Mapping[str, float]) -> None:
        self._run.log(dict(found), step=number, commit=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
