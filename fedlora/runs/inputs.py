"""What a run reads and does not keep, by its digests, so that it goes on with what it began with or not at all."""

import json
from pathlib import Path

from fedlora.config.data import Data, Docstrings, Files, HuggingFace
from fedlora.config.schema import RunConfig
from fedlora.data.records import Examples
from fedlora.data.tokenise import fingerprint
from fedlora.disk import write_durably
from fedlora.errors import ConfigError
from fedlora.runs.forgetting import forgotten
from fedlora.runs.rundir import INPUTS, run_inputs
from fedlora.training.checkpoints import base_digest


def record_inputs(config: RunConfig, run_dir: Path, *, test: Examples, train: Examples | None = None) -> None:
    """`inputs.json` says what the run reads; it is written once, for a run of an older fedlora when that goes on.

    Args:
        config: of the run.
        run_dir: of the run.
        test: the public records that it is scored on.
        train: everybody's records; None of a server, which has none. Once a client is forgotten, its records may be
            gone, and none are compared.

    Raises:
        ConfigError: it began with others than are read now.
    """
    found = {"base_model": base_digest(config.model, task_cfg=config.task), "test": fingerprint(test)}
    if train is not None and not forgotten(run_dir):
        found["train"] = fingerprint(train)
    known = run_inputs(run_dir)
    if known is None:
        write_durably(run_dir / INPUTS, json.dumps(found, indent=2) + "\n")
        return
    for name in found:
        if name in known and known[name] != found[name]:
            raise ConfigError(
                f"{_other(name, config)} now than when {run_dir} began; put back what was there, or begin a new run "
                "with another output"
            )


def require_base(config: RunConfig, run_dir: Path) -> None:
    """What the run trained belongs to the base model that is at `model.name` now.

    Raises:
        ConfigError: the run began with another one.
    """
    known = run_inputs(run_dir)
    if known is None or "base_model" not in known:  # of an older fedlora
        return
    if known["base_model"] != base_digest(config.model, task_cfg=config.task):
        raise ConfigError(
            f"{_other('base_model', config)} now than when {run_dir} began, to which its adapter belongs; put back "
            "what was there"
        )


def _other(name: str, config: RunConfig) -> str:
    if name == "base_model":
        return f"model.name: {config.model.name} holds other weights"
    return f"{_place(name, config.data)} gives other records, as the model reads them,"


def _place(part: str, data: Data) -> str:
    """The key and the value that say where the records of `test` or `train` come from."""
    match data:
        case Files():
            return f"data.{part}: {getattr(data, part)}"
        case HuggingFace():
            return f"data.{part}_split: {getattr(data, f'{part}_split')} of {data.path}"
        case Docstrings():
            return "data.packages: what is installed here"
