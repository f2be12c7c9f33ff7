"""How every run begins, simulated or served: where its requests come from, and the zero-step state."""

from fedlora.code_digest import code_digest
from fedlora.config.schema import RunConfig
from fedlora.federation.absorb import start
from fedlora.methods import Method
from fedlora.methods.subspace import Public, Subspace
from fedlora.training.checkpoints import base_digest
from fedlora.training.load import load_tokenizer
from fedlora.training.model import AdaptedModel
from fedlora.training.public import input_directions, mean_inputs, weight_directions
from fedlora.values import Origin, ServerState, Site


def first_state(config: RunConfig, model: AdaptedModel, method: Method) -> ServerState:
    """The zero-step state: B = 0, the head as the model has it, A as the method draws it."""
    return start(
        model.shapes(),
        head=model.head(),
        lora_cfg=config.lora,
        method=method,
        seed=config.seed,
        dtype=next(iter(model.trained.values())).dtype,
        public=public_facts(config, model, method.subspace),
    )


def public_facts(config: RunConfig, model: AdaptedModel, subspace: Subspace) -> dict[Site, Public]:
    """Of each site, what the subspace looks at."""
    layers, r = model.layers(), config.lora.r
    weights = weight_directions(layers, r) if "principal" in (subspace.init, subspace.left) else {}
    means, inputs = {}, {}
    if subspace.init in ("centred", "activations"):
        tokenizer = load_tokenizer(config.model.name)
        if subspace.init == "centred":
            means = mean_inputs(model.peft_model, layers, tokenizer)
        else:
            inputs = input_directions(model.peft_model, layers, tokenizer, r)
    return {
        site: Public(
            mean_input=means.get(site),
            input_rows=inputs.get(site),
            weight_columns=weights[site][0] if weights else None,
            weight_rows=weights[site][1] if weights else None,
        )
        for site in layers
    }


def origin(config: RunConfig, run: str) -> Origin:
    """What every request of this run says of where it comes from."""
    return Origin(run=run, base_model=base_digest(config.model), code=code_digest())
