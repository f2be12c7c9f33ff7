"""The forward pass of an adapted layer: PEFT's own, less what it pays for cases that never occur here."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.kernels.packed import PackedLinear
from fedlora.training.model import ADAPTER, REST, AdaptedModel
from fedlora.training.same_input import SameInput

LEFT = "lora_left"
"""Attribute of an adapted layer: the frozen frame (d_out, r) before its core."""


def train_core(layer: LoraLayer) -> nn.Parameter:
    """`layer`'s B is an r x r core from here on, zero like B, before it a left frame (d_out, r), which is returned.

    The core is a linear layer like B, so all that trains, clips and stacks a B takes it as it is.
    """
    up = layer.lora_B[ADAPTER]
    assert isinstance(up, nn.Linear)
    core = nn.Linear(
        up.in_features, up.in_features, bias=False, device=up.weight.device, dtype=up.weight.dtype
    )
    nn.init.zeros_(core.weight)
    layer.lora_B[ADAPTER] = core
    assert isinstance(layer, nn.Module)  # every LoRA layer of PEFT's is one
    # A parameter stays the same object when a model moves to another device, where a buffer becomes another.
    left = nn.Parameter(torch.zeros_like(up.weight), requires_grad=False)
    layer.register_parameter(LEFT, left)
    return left


def scale_low(layer: LoraLayer, same_input: SameInput | None) -> None:
    """`layer` computes W x + B (scale A x), where PEFT computes W x + scale (B A x); with a left frame, L of it; with a
    rest, that times x as well.

    So the scaling touches r numbers a token, not d_out, and the sum is formed in the place of W x, or in its pass.
    There is one adapter, no dropout, and nothing is ever merged; whatever else PEFT is asked for, it does itself.

    Args:
        layer: changed in place.
        same_input: of this layer and others, which together compute A x; None where it is alone.
    """
    # A partial function can be copied and pickled, where a method cannot.
    layer.forward = partial(_forward, layer, same_input)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def without_adapters(adapted: AdaptedModel) -> Iterator[None]:
    """Inside, every adapted layer computes W x alone, whatever its A, B, frame or rest.

    PEFT's own `disable_adapter` makes A trainable on its way out, and what is trainable has to be clipped.
    """
    layers = adapted.layers().values()
    try:
        for layer in layers:
            layer._disable_adapters = True  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]


def _forward(
    layer: LoraLayer, same_input: SameInput | None, x: Tensor, *args: object, **kwargs: object
) -> Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)  # pyright: ignore
    down, up, base = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.base_layer
    assert isinstance(down, nn.Linear)
    low = None if same_input is None else same_input.low(layer, x)
    if low is None:
        low = down(x.to(down.weight.dtype)) * layer.scaling[ADAPTER]
    plus = up(low)
    if (left := getattr(layer, LEFT, None)) is not None:
        plus = plus @ left.T
    if (rest := getattr(layer, REST, None)) is not None:
        plus = plus + x.to(rest.dtype) @ rest.T
    if isinstance(base, PackedLinear) and plus.dtype == x.dtype:
        return base(x, plus)
    y = base(x)
    return y.add_(plus) if plus.dtype == y.dtype else (y + plus).to(y.dtype)
