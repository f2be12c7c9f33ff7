"""Scoring an adapter, of a run or of a PEFT directory, on the test data that a config names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.config.located import flat
from fedlora.config.schema import RunConfig
from fedlora.errors import ConfigError
from fedlora.federation.events import Listener
from fedlora.runs.rundir import run_config
from fedlora.runs.trained import trained_adapters
from fedlora.runtime.prepare import Prepared, prepare
from fedlora.training.tasks import evaluate


def prepared_for_scoring(config: RunConfig, listener: Listener) -> Prepared:
    """The run without its noise: scoring on public data spends nothing, so none needs to be calibrated.

    Raises:
        DataError: of a private run's config, its test data are mostly what it trains on.
    """
    return prepare(config, listener, to_train=False)


def load_run(path: Path, prepared: Prepared) -> None:
    """The model has the newest adapters of the run in `path`.

    Raises:
        ConfigError: the run trained another model, or tells other classes apart, than the config says.
    """
    _require_same(path, run_config(path), prepared.config)
    adapters, classes = trained_adapters(path)
    if classes != prepared.clients.classes:
        theirs, ours = list(classes), list(prepared.clients.classes)
        raise ConfigError(f"{path} tells {theirs} apart, the data {ours}; use the same labels")
    prepared.model.load(adapters)


def score(prepared: Prepared) -> dict[str, Any]:
    """{metric, score, loss, examples} of the model as it is, on the config's test data."""
    found = evaluate(prepared.model, prepared.clients.test)
    examples = len(prepared.clients.test)
    return {"metric": found.metric, "score": found.value, "loss": found.loss, "examples": examples}


def _require_same(path: Path, made_by: RunConfig, config: RunConfig) -> None:
    """The config describes the model that the run trained. A frozen random head follows from the seed."""
    frozen = getattr(made_by.task, "head", None) == "frozen"
    sections = {"model", "task", "lora", "seed"} if frozen else {"model", "task", "lora"}
    theirs, ours = (dict(flat(c.model_dump(mode="json", include=sections))) for c in (made_by, config))
    for key in sorted({*theirs, *ours}):
        there, here = theirs.get(key), ours.get(key)
        if there != here and not isinstance(here, Mapping):
            name = ".".join(key)
            raise ConfigError(f"{name}: {here!r}, but {path} was trained with {there!r}; make them equal")
