"""How every run begins, simulated or served: where its requests come from, and the zero-step state."""

import json
from pathlib import Path

from fedlora.code_digest import code_digest
from fedlora.config.data import Files, HuggingFace
from fedlora.config.ranks import largest_rank, rank_of
from fedlora.config.schema import RunConfig
from fedlora.data.own import file_records
from fedlora.data.records import Examples
from fedlora.disk import write_durably
from fedlora.errors import ConfigError
from fedlora.federation.absorb import start
from fedlora.methods import Method
from fedlora.methods.subspace import Public, Subspace
from fedlora.runs.rundir import BEGAN_FROM, began_from
from fedlora.training.agreed import agreed_digest
from fedlora.training.examples import reader_of
from fedlora.training.from_adapter import adapter_digest, read_adapter
from fedlora.training.gradients import gradient_directions
from fedlora.training.model import AdaptedModel, transformer_of
from fedlora.training.public import input_directions, mean_inputs, weight_directions
from fedlora.values import Origin, ServerState, Site


def first_state(config: RunConfig, model: AdaptedModel, method: Method) -> ServerState:
    """The zero-step state: B = 0, the head as the model has it, A as the method draws it; or with the products of the
    adapter that the config begins from.
    """
    given = config.lora.from_adapter
    return start(
        model.shapes(),
        head=model.head(),
        lora_cfg=config.lora,
        method=method,
        dtype=next(iter(model.trained.values())).dtype,
        public=public_facts(config, model, method.subspace),
        products=None if given is None else read_adapter(given).at_scale(model.scale),
    )


def record_beginning(config: RunConfig, run_dir: Path) -> None:
    """The run says which adapter it began from, if from any: `began_from.json`, written once.

    Raises:
        ConfigError: it began from other bytes than lie there now.
    """
    if (given := config.lora.from_adapter) is None:
        return
    require_beginning(config, run_dir)
    if began_from(run_dir) is None:
        words = {
            "name": Path(given).resolve().name,
            "sha256": read_adapter(given).sha256,
            "files": adapter_digest(given),
        }
        write_durably(run_dir / BEGAN_FROM, json.dumps(words, indent=2) + "\n")


def require_beginning(config: RunConfig, run_dir: Path) -> None:
    """Passes a run that began from the bytes that lie there now, or from none, or has not said yet from which.

    Raises:
        ConfigError: it began from others.
    """
    given, known = config.lora.from_adapter, began_from(run_dir)
    if given is not None and known is not None and adapter_digest(given) != known["files"]:
        raise ConfigError(
            f"lora.from_adapter: {given} holds other files now than when {run_dir} began (SHA-256 "
            f"{read_adapter(given).sha256}, then {known['sha256']}); restore it, or begin anew in another output"
        )


def public_facts(config: RunConfig, model: AdaptedModel, subspace: Subspace) -> dict[Site, Public]:
    """Of each site, what the subspace looks at."""
    layers, r = model.layers(), largest_rank(config.lora)
    weights = weight_directions(layers, r) if "principal" in (subspace.init, subspace.left) else {}
    gradients = {}
    if "gradients" in (subspace.init, subspace.left):
        gradients = gradient_directions(model, _public_examples(config, model), r)
    means, inputs = {}, {}
    if subspace.init in ("centred", "activations"):
        public = model.intake.public(transformer_of(model.peft_model))
        if subspace.init == "centred":
            means = mean_inputs(model.peft_model, layers, public)
        else:
            inputs = input_directions(model.peft_model, layers, public, r)
    ranks = {site: rank_of(config.lora, site) for site in layers}
    return {
        site: Public(
            mean_input=means.get(site),
            input_rows=inputs[site][:rank] if inputs else None,
            weight_columns=weights[site][0][:rank] if weights else None,
            weight_rows=weights[site][1][:rank] if weights else None,
            gradient_columns=gradients[site][0][:rank] if gradients else None,
            gradient_rows=gradients[site][1][:rank] if gradients else None,
        )
        for site, rank in ranks.items()
    }


def _public_examples(config: RunConfig, model: AdaptedModel) -> Examples:
    """The labelled records that the config calls public, as the model reads them."""
    data, task = config.data, config.task
    assert isinstance(data, Files | HuggingFace) and data.public is not None, "combinations.py asks for it"
    classes = () if task.causal else tuple(transformer_of(model.peft_model).config.id2label.values())
    read = reader_of(name=config.model.name, max_length=data.max_length, task_cfg=task)
    return read(file_records(data.public, data, task, classes))


def origin(config: RunConfig, run: str) -> Origin:
    """What every request of this run says of where it comes from."""
    return Origin(run=run, base_model=agreed_digest(config), code=code_digest())
