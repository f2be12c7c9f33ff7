"""The forward pass of an adapted layer: PEFT's own, less what it pays for cases that never occur here."""

from types import MethodType

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.kernels.packed import PackedLinear
from fedlora.training.model import ADAPTER


def scale_low(layer: LoraLayer) -> None:
    """`layer` computes W x + B (scale A x), where PEFT computes W x + scale (B A x).

    So the scaling touches r numbers a token, not d_out, and the sum is formed in the place of W x, or in its pass.
    There is one adapter, no dropout, and nothing is ever merged; whatever else PEFT is asked for, it does itself.
    """
    layer.forward = MethodType(_forward, layer)  # pyright: ignore[reportAttributeAccessIssue]


def _forward(layer: LoraLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)  # pyright: ignore
    down, up, base = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.base_layer
    assert isinstance(down, nn.Linear)
    low = up(down(x.to(down.weight.dtype)) * layer.scaling[ADAPTER])
    if isinstance(base, PackedLinear) and low.dtype == x.dtype:
        return base(x, low)
    y = base(x)
    return y.add_(low) if low.dtype == y.dtype else (y + low).to(y.dtype)
