"""How every run begins, simulated or served: where its requests come from, and the zero-step state."""

from fedlora.code_digest import code_digest
from fedlora.config.schema import RunConfig
from fedlora.federation.absorb import start
from fedlora.methods import Method
from fedlora.training.checkpoints import base_digest
from fedlora.training.load import load_tokenizer
from fedlora.training.model import AdaptedModel
from fedlora.values import Origin, ServerState


def first_state(config: RunConfig, model: AdaptedModel, method: Method) -> ServerState:
    """The zero-step state: B = 0, the head as the model has it, A as the method draws it."""
    centred = method.subspace.init == "centred"
    return start(
        model.shapes(),
        head=model.head(),
        lora_cfg=config.lora,
        method=method,
        seed=config.seed,
        dtype=next(iter(model.trained.values())).dtype,
        mean_inputs=model.mean_inputs(load_tokenizer(config.model.name)) if centred else None,
    )


def origin(config: RunConfig, run: str) -> Origin:
    """What every request of this run says of where it comes from."""
    return Origin(run=run, base_model=base_digest(config.model), code=code_digest())
