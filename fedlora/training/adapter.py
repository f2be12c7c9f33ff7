"""The forward pass of an adapted layer: PEFT's own, less what it pays for cases that never occur here."""

from functools import partial

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.kernels.packed import PackedLinear
from fedlora.training.model import ADAPTER
from fedlora.training.same_input import SameInput


def scale_low(layer: LoraLayer, same_input: SameInput | None) -> None:
    """`layer` computes W x + B (scale A x), where PEFT computes W x + scale (B A x).

    So the scaling touches r numbers a token, not d_out, and the sum is formed in the place of W x, or in its pass.
    There is one adapter, no dropout, and nothing is ever merged; whatever else PEFT is asked for, it does itself.

    Args:
        layer: changed in place.
        same_input: of this layer and others, which together compute A x; None where it is alone.
    """
    # A partial function can be copied and pickled, where a method cannot.
    layer.forward = partial(_forward, layer, same_input)  # pyright: ignore[reportAttributeAccessIssue]


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
    if isinstance(base, PackedLinear) and plus.dtype == x.dtype:
        return base(x, plus)
    y = base(x)
    return y.add_(plus) if plus.dtype == y.dtype else (y + plus).to(y.dtype)
