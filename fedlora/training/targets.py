"""Which layers of a model an adapter stands beside."""

import re

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.config import schema
from fedlora.errors import ModelError


def targets(model: PreTrainedModel, lora_cfg: schema.Lora, saved: list[str]) -> list[str]:
    """What PEFT is told to adapt: the names of the config, or of all-linear every linear layer's path but the head's.

    Args:
        model: before PEFT touched it.
        lora_cfg: `target_modules` and `layers_to_transform` are read.
        saved: modules that an export carries whole, and that nothing stands beside.

    Raises:
        ModelError: a name that no linear layer's path ends with, or a layer number that none of them has.
    """
    output = model.get_output_embeddings()
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and not is_within(name, saved)
    ]
    wanted = layers if lora_cfg.target_modules == "all-linear" else lora_cfg.target_modules
    numbers: dict[str, int] = {}
    for target in wanted:
        matched = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matched:
            last = sorted({name.rpartition(".")[2] for name in layers})
            raise ModelError(
                f"lora.target_modules: {target!r} matches no linear layer of {type(model).__name__}; "
                f"it has {', '.join(map(repr, last))}, or write all-linear"
            )
        # the first numbered part of the path, which is what PEFT takes for the layer
        numbers |= {name: int(m[1]) for name in matched if (m := re.match(r".*?\.[^.]*\.(\d+)\.", name))}
    only = lora_cfg.layers_to_transform
    if missing := sorted(set(only or ()) - set(numbers.values())):
        raise ModelError(
            f"lora.layers_to_transform: {type(model).__name__} has no layer {missing} with "
            f"{lora_cfg.target_modules}; it has {sorted(set(numbers.values()))}"
        )
    if wanted is layers and only is not None:
        return [name for name in layers if numbers.get(name) in only]
    return list(wanted)


def is_within(name: str, modules: list[str]) -> bool:
    """Whether a path is that of one of the modules, or of something in it."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
