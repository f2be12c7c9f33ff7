"""Layers that keep only what enters them, and run again in the backward pass."""

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora.errors import ModelError
from fedlora.training.model import transformer_of

_NO_CACHE = {"use_cache": False, "past_key_values": None, "layer_past": None}
"""Arguments by which a layer would append to a cache of keys: once more when it runs again. As transformers has it."""


def recompute_layers(peft_model: PeftModel) -> None:
    """Every layer of the stack runs again in the backward pass, and keeps only what enters it.

    transformers does that for layers in training mode alone, where OPT, BART and others draw dropout themselves, in no
    module that would stay in evaluation mode. So it is done here, in whatever mode a layer is.

    Args:
        peft_model: changed in place.

    Raises:
        ModelError: transformers says of no layer, or not of this model, that it can be run again.
    """
    model = transformer_of(peft_model)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ModelError(
            f"model.gradient_checkpointing: transformers cannot recompute {type(model).__name__}'s layers; write false"
        )
    for layer in layers:
        # A partial function can be copied and pickled, where a method cannot.
        layer.forward = partial(_recomputed, layer)


def _recomputed(layer: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
    forward = type(layer).forward
    if not torch.is_grad_enabled():  # nothing would be kept
        return forward(layer, *args, **kwargs)
    kwargs |= {name: value for name, value in _NO_CACHE.items() if name in kwargs}
    # The reentrant kind hides the backward pass from the hooks that clip.
    return checkpoint(partial(forward, layer, **kwargs), *args, use_reentrant=False)
