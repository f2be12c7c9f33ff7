"""From a checkpoint to a model that can be trained here: LoRA injected by PEFT, all else frozen."""

import platform
import re
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fedlora.config import schema
from fedlora.errors import ModelError
from fedlora.kernels.packed import available, pack_frozen
from fedlora.kernels.quantised import Quantization, quantise_frozen
from fedlora.seeds import seed_for
from fedlora.training.adapter import scale_low, train_core
from fedlora.training.checkpoints import load_base, locate, quiet
from fedlora.training.model import ADAPTER, LORA_B, AdaptedModel, transformer_of
from fedlora.training.public import make_identity_pooler
from fedlora.training.same_input import same_inputs
from fedlora.values import Site


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model of this name.

    Raises:
        ModelError: the model is not there, or comes without a tokenizer.
    """
    path = locate(name)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.name {name!r}: no tokenizer loads from {str(path)!r}: {error}; put its files there"
        ) from error


def load_model(
    model_cfg: schema.Model, task_cfg: schema.Task, lora_cfg: schema.Lora, classes: tuple[str, ...], seed: int
) -> AdaptedModel:
    """The base model with B = 0 and, for a classifier, its head: zero where trained, random by seed where
    frozen.

    Equal arguments give equal weights in every process; torch's global generator is left as it was.

    Raises:
        ModelError: the model is not there, or has no such modules, or `lora.r` exceeds one of them, or this machine
            lacks the kernels.
    """
    trained_head = isinstance(task_cfg, schema.Classification) and task_cfg.head == "trained"
    with torch.random.fork_rng(devices=[]):  # transformers and PEFT draw new layers from the global generator
        torch.manual_seed(seed_for(seed, "head"))
        model, new = load_base(model_cfg, task_cfg, classes)
        if isinstance(task_cfg, schema.Classification) and task_cfg.pooler == "identity":
            new = (*new, *make_identity_pooler(model, load_tokenizer(model_cfg.name)))
        head = {} if isinstance(task_cfg, schema.CausalLm) else _head_layers(model, len(classes))
        _draw_head(model, head, new, seed, zero_output=trained_head)
        saved = _saved_modules(model, head, new)
        _require_targets(model, lora_cfg, saved)
        peft_model = _injected(model, lora_cfg, saved, isinstance(task_cfg, schema.CausalLm))
    layers = _lora_layers(peft_model)
    _require_linear(layers, lora_cfg.r)
    peft_model.eval()
    together = same_inputs(peft_model, layers)
    left = {site: train_core(layer) for site, layer in layers.items()} if lora_cfg.trains == "core" else {}
    model.config.use_cache = False  # nothing is generated while training
    trained = _only_trained(peft_model, layers, head if trained_head else {})
    changing = frozenset(id(layer.lora_A[ADAPTER]) for layer in layers.values())
    onednn = _uses_onednn(model_cfg.kernels)
    if model_cfg.quantization != "none":
        _quantise(peft_model, model_cfg.quantization, saved, changing, onednn)
    if onednn:
        pack_frozen(peft_model, but=changing)
    for site, layer in layers.items():
        scale_low(layer, together.get(site))
    peft_model.eval()  # whatever was put in since
    if model_cfg.gradient_checkpointing:
        _recompute_layers(peft_model)
    return AdaptedModel(
        peft_model=peft_model,
        sites=tuple(layers),
        scale=lora_cfg.lora_alpha / lora_cfg.r,
        live={site: (_weight(layer.lora_A), _weight(layer.lora_B)) for site, layer in layers.items()},
        left=left,
        trained=trained,
        causal=isinstance(task_cfg, schema.CausalLm),
        pad_token=model.config.pad_token_id,
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
        return path.startswith(inside) and not _is_within(path, saved) and id(layer) not in changing

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


def _recompute_layers(peft_model: PeftModel) -> None:
    """Every layer of the stack runs again in the backward pass, and keeps only what enters it."""
    layers = [module for module in peft_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        name = type(transformer_of(peft_model)).__name__
        raise ModelError(
            f"model.gradient_checkpointing: transformers cannot recompute {name}'s layers; write false"
        )
    peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = (
            True  # which it asks for; what is inside stays in evaluation mode, so no dropout wakes
        )


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


def _require_targets(model: PreTrainedModel, lora_cfg: schema.Lora, saved: list[str]) -> None:
    """Refuses a target that names no layer, and a layer number that no target has."""
    layers = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not _is_within(n, saved)
    ]
    numbers: set[int] = set()
    for target in lora_cfg.target_modules:
        matched = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matched:
            last = sorted({name.rpartition(".")[2] for name in layers})
            raise ModelError(
                f"lora.target_modules: {target!r} matches no linear layer of {type(model).__name__}; "
                f"it has {', '.join(map(repr, last))}"
            )
        # the first numbered part of the path, which is what PEFT takes for the layer
        numbers |= {int(m[1]) for name in matched if (m := re.match(r".*?\.[^.]*\.(\d+)\.", name))}
    missing = sorted(set(lora_cfg.layers_to_transform or ()) - numbers)
    if missing:
        raise ModelError(
            f"lora.layers_to_transform: {type(model).__name__} has no layer {missing} with "
            f"{lora_cfg.target_modules}; it has {sorted(numbers)}"
        )


def _is_within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _injected(model: PreTrainedModel, lora_cfg: schema.Lora, saved: list[str], causal: bool) -> PeftModel:
    config = LoraConfig(
        r=lora_cfg.r,
        lora_alpha=lora_cfg.lora_alpha,  # pyright: ignore[reportArgumentType]  # PEFT only divides it by r
        lora_dropout=0.0,
        bias="none",
        target_modules=list(lora_cfg.target_modules),
        layers_to_transform=lora_cfg.layers_to_transform,
        modules_to_save=saved or None,
        task_type=TaskType.CAUSAL_LM if causal else TaskType.SEQ_CLS,
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


def _require_linear(layers: Mapping[Site, LoraLayer], r: int) -> None:
    for site, layer in layers.items():
        if ADAPTER not in layer.lora_B or not isinstance(layer.lora_B[ADAPTER], nn.Linear):
            raise ModelError(f"lora.target_modules: {site!r} is no linear layer; name linear layers only")
        shape = _weight(layer.lora_B).shape[0], _weight(layer.lora_A).shape[1]
        if r > min(shape):
            raise ModelError(
                f"lora.r {r} exceeds {site!r} of shape {shape}; lower it to {min(shape)} or less"
            )


def _only_trained(
    peft_model: PeftModel, layers: Mapping[Site, LoraLayer], head: Mapping[str, nn.Linear]
) -> dict[str, nn.Parameter]:
    """Only these parameters require a gradient from here on: every B by site, then the head's by name."""
    peft_model.requires_grad_(False)
    trained = {f"{site}{LORA_B}": _turned(_weight(layer.lora_B)) for site, layer in layers.items()}
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
