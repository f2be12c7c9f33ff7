"""From a checkpoint to a model that can be trained here: LoRA injected by PEFT, all else frozen."""

import platform
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedlora.config import schema
from fedlora.config.ranks import matching, rank_of
from fedlora.errors import ModelError
from fedlora.kernels.packed import available, pack_frozen
from fedlora.kernels.quantised import Quantization, quantise_frozen
from fedlora.seeds import seed_for
from fedlora.training.adapter import scale_low, train_core
from fedlora.training.checkpoints import load_base, quiet
from fedlora.training.examples import intake_of
from fedlora.training.from_adapter import read_adapter, require_sites, take_saved
from fedlora.training.model import ADAPTER, LORA_A, LORA_B, AdaptedModel, transformer_of
from fedlora.training.positions import require_positions
from fedlora.training.public import make_identity_pooler
from fedlora.training.recompute import recompute_layers
from fedlora.training.rows_seen import require_row_a_record
from fedlora.training.same_input import same_inputs
from fedlora.training.singular_values import train_singular_values
from fedlora.training.targets import is_within, targets
from fedlora.training.tasks import objective_of
from fedlora.training.tokens import load_tokenizer
from fedlora.values import Site

PEFT_TASKS = {
    "sequence-classification": TaskType.SEQ_CLS,
    "image-classification": None,
    "causal-lm": TaskType.CAUSAL_LM,
    "dpo": TaskType.CAUSAL_LM,
}
"""PEFT's names; where it has none, its model passes on whatever it is called with."""


def load_model(
    model_cfg: schema.Model,
    task_cfg: schema.Task,
    lora_cfg: schema.Lora,
    classes: tuple[str, ...],
    seed: int,
    *,
    max_length: int | None = None,
    any_rank: bool = False,
) -> AdaptedModel:
    """The base model with B = 0 and, for a classifier, its head: zero where trained, random by seed where
    frozen; or as the adapter that `lora.from_adapter` names carries it.

    Equal arguments give equal weights in every process; torch's global generator is left as it was. max_length: of the
    texts that it will be given. any_rank: also one that exceeds a side of a site, as an export may need it; nothing can
    be trained with it.

    Raises:
        ModelError: the model is not there, or has places for fewer tokens, or has no such modules, or `lora.r` exceeds
            one of them, or one is not given a row a record, or this machine lacks the kernels.
        ConfigError: `lora.from_adapter` names no adapter, or one that these layers, ranks or classes cannot hold.
    """
    given = None if lora_cfg.from_adapter is None else read_adapter(lora_cfg.from_adapter)
    trained_head = getattr(task_cfg, "head", None) == "trained"
    with torch.random.fork_rng(devices=[]):  # transformers and PEFT draw new layers from the global generator
        torch.manual_seed(seed_for(seed, "head"))
        model, new = load_base(model_cfg, task_cfg, classes)
        require_positions(type(model).__name__, {n: p.shape for n, p in model.named_parameters()}, max_length)
        intake = intake_of(model_cfg.name, task_cfg, model)
        if isinstance(task_cfg, schema.Classification) and task_cfg.pooler == "identity":
            new = (*new, *make_identity_pooler(model, load_tokenizer(model_cfg.name)))
        head = {} if task_cfg.causal else _head_layers(model, len(classes))
        _draw_head(model, head, new, seed, zero_output=trained_head)
        saved = _saved_modules(model, head, new)
        peft_model = _injected(model, lora_cfg, saved, task_cfg)
    layers = _lora_layers(peft_model)
    _require_linear(layers, None if any_rank else lora_cfg)
    if given is not None:
        shapes = {s: (len(_weight(m.lora_B)), _weight(m.lora_A).shape[1]) for s, m in layers.items()}
        require_sites(given, shapes, {site: rank_of(lora_cfg, site) for site in layers})
    peft_model.eval()
    inputs = intake.made_up(model)
    together = same_inputs(peft_model, layers, inputs)
    instead = {"core": train_core, "singular-values": train_singular_values}.get(lora_cfg.trains)
    left = {} if instead is None else {site: instead(layer) for site, layer in layers.items()}
    model.config.use_cache = False  # nothing is generated while training
    trained = _only_trained(peft_model, layers, head if trained_head else {}, with_a=lora_cfg.trains == "ab")
    if given is not None:
        take_saved(given, transformer_of(peft_model), saved, classes)
    changing = frozenset(id(layer.lora_A[ADAPTER]) for layer in layers.values())
    onednn = _uses_onednn(model_cfg.kernels)
    if model_cfg.quantization != "none":
        _quantise(peft_model, model_cfg.quantization, saved, changing, onednn)
    if onednn:
        pack_frozen(peft_model, but=changing)
    for site, layer in layers.items():
        scale_low(layer, together.get(site))
    peft_model.eval()  # whatever was put in since
    require_row_a_record(peft_model, trained, inputs)
    if model_cfg.gradient_checkpointing:
        recompute_layers(peft_model)
    return AdaptedModel(
        peft_model=peft_model,
        sites=tuple(layers),
        scale=lora_cfg.lora_alpha / lora_cfg.r,
        live={site: (_weight(layer.lora_A), _weight(layer.lora_B)) for site, layer in layers.items()},
        left=left,
        trained=trained,
        causal=task_cfg.causal,
        objective=objective_of(task_cfg),
        intake=intake,
    )


def _quantise(
    peft_model: PeftModel,
    quantization: Quantization,
    saved: list[str],
    changing: frozenset[int],
    onednn: bool,
) -> None:
    """Linear layers inside the encoder or decoder are rounded, but for those that an export carries whole."""
    model = transformer_of(peft_model)
    inside = f"{model.base_model_prefix}."

    def serves(path: str, layer: nn.Module) -> bool:
        return path.startswith(inside) and not is_within(path, saved) and id(layer) not in changing

    if quantise_frozen(model, quantization, serves, onednn=onednn) == 0:
        raise ModelError(
            f"model.quantization: {type(model).__name__} has no frozen nn.Linear under {inside!r} to round; write none"
        )


def _uses_onednn(kernels: str) -> bool:
    if kernels == "onednn" and not available():
        raise ModelError(
            f"model.kernels: onednn, which torch {torch.__version__} does not offer on {platform.machine()}; "
            "write kernels: auto"
        )
    return kernels != "torch" and available()


def _head_layers(model: PreTrainedModel, classes: int) -> dict[str, nn.Linear]:
    """The linear layers outside the encoder, in the order of definition; the last gives the logits."""
    inside = f"{model.base_model_prefix}."
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inside)}
    if not layers or list(layers.values())[-1].out_features != classes:
        raise ModelError(
            f"{type(model).__name__} does not end in a linear layer of {classes} classes (linear outside "
            f"the encoder: {list(layers)}); take an encoder whose head transformers builds from nn.Linear"
        )
    return layers


@torch.no_grad()
def _draw_head(
    model: PreTrainedModel,
    head: Mapping[str, nn.Linear],
    new: tuple[str, ...],
    seed: int,
    *,
    zero_output: bool,
) -> None:
    """The last layer is zero or drawn, and others that the checkpoint lacks are drawn as transformers would.

    A hidden layer must not be zero as well: two zero layers in a row have no gradient.
    """
    std = float(getattr(model.config, "initializer_range", 0.02))
    output = list(head)[-1:]
    for name, layer in head.items():
        if f"{name}.weight" not in new and name not in output:
            continue
        generator = torch.Generator().manual_seed(seed_for(seed, "head", name))
        drawn = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64) * std
        layer.weight.copy_(torch.zeros_like(drawn) if zero_output and name in output else drawn)
        if layer.bias is not None:
            layer.bias.zero_()


def _saved_modules(model: PreTrainedModel, head: Mapping[str, nn.Linear], new: tuple[str, ...]) -> list[str]:
    """What an exported adapter must carry whole: the head, and all else that the checkpoint lacks."""
    saved = {name.split(".")[0] for name in head}
    owners = {parameter.rpartition(".")[0] for parameter in new}
    return sorted(saved | {owner for owner in owners if owner.split(".")[0] not in saved})


def _injected(
    model: PreTrainedModel, lora_cfg: schema.Lora, saved: list[str], task_cfg: schema.Task
) -> PeftModel:
    names = targets(model, lora_cfg, saved)
    listed = lora_cfg.target_modules != "all-linear"
    ranks, scale = lora_cfg.rank_pattern or {}, lora_cfg.lora_alpha / lora_cfg.r
    config = LoraConfig(
        r=lora_cfg.r,
        lora_alpha=lora_cfg.lora_alpha,  # pyright: ignore[reportArgumentType]  # PEFT only divides it by r
        lora_dropout=0.0,
        bias="none",
        target_modules=names,
        # PEFT asks a whole path for no number; those of all-linear are chosen already.
        layers_to_transform=lora_cfg.layers_to_transform if listed else None,
        rank_pattern=dict(ranks),
        alpha_pattern={pattern: scale * r for pattern, r in ranks.items()},
        modules_to_save=saved or None,
        task_type=PEFT_TASKS[task_cfg.kind],
    )
    try:
        with quiet():
            peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"PEFT cannot adapt {lora_cfg.target_modules} of {type(model).__name__}: {error}"
        ) from error
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _lora_layers(peft_model: PeftModel) -> dict[Site, LoraLayer]:
    return {n: m for n, m in sorted(transformer_of(peft_model).named_modules()) if isinstance(m, LoraLayer)}


def _weight(layers: nn.ModuleDict) -> nn.Parameter:
    weight = layers[ADAPTER].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _require_linear(layers: Mapping[Site, LoraLayer], lora_cfg: schema.Lora | None) -> None:
    """Refuses what is no linear layer; given a config, also a rank that a layer cannot have, and a pattern of none."""
    patterns = {} if lora_cfg is None else lora_cfg.rank_pattern or {}
    for pattern in patterns:
        if not any(matching([pattern], site) for site in layers):
            raise ModelError(
                f"lora.rank_pattern: {pattern!r} is the end of no adapted layer's path, such as {next(iter(layers))!r}"
            )
    for site, layer in layers.items():
        if ADAPTER not in layer.lora_B or not isinstance(layer.lora_B[ADAPTER], nn.Linear):
            raise ModelError(f"lora.target_modules: {site!r} is no linear layer; name linear layers only")
        shape = _weight(layer.lora_B).shape[0], _weight(layer.lora_A).shape[1]
        r = 0 if lora_cfg is None else rank_of(lora_cfg, site)
        if r > min(shape):
            key = "lora.r" if matching(patterns, site) is None else "lora.rank_pattern:"
            raise ModelError(f"{key} {r} exceeds {site!r} of shape {shape}; lower it to {min(shape)} or less")


def _only_trained(
    peft_model: PeftModel, layers: Mapping[Site, LoraLayer], head: Mapping[str, nn.Linear], *, with_a: bool
) -> dict[str, nn.Parameter]:
    """Only these parameters require a gradient from here on: every B by site, every A if asked, the head's by name."""
    peft_model.requires_grad_(False)
    trained = {f"{site}{LORA_B}": _turned(_weight(layer.lora_B)) for site, layer in layers.items()}
    if with_a:
        trained |= {f"{site}{LORA_A}": _weight(layer.lora_A) for site, layer in layers.items()}
    # PEFT put copies of the head's modules in their place; the layers of `head` are no longer used.
    for name in sorted(head):
        top, _, rest = name.partition(".")
        wrapper = transformer_of(peft_model).get_submodule(top)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        copied = wrapper.modules_to_save[ADAPTER]
        _in_float32_or_wider(copied)
        live = copied.get_submodule(rest)
        trained |= {f"{name}.{own}": parameter for own, parameter in live.named_parameters(recurse=False)}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _turned(b: nn.Parameter) -> nn.Parameter:
    """The same B (d_out, r), its longer axis last in memory.

    The backward pass multiplies (tokens, d_out) by it, which MKL does in less than half the time this way round.
    """
    b.data = b.data.t().contiguous().t()
    return b


def _in_float32_or_wider(module: nn.Module) -> None:
    """The trained head of a bfloat16 model computes in float32, as B does: small steps would vanish."""
    if any(parameter.dtype == torch.bfloat16 for parameter in module.parameters()):
        module.float()
        module.register_forward_pre_hook(_widened)


def _widened(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)
