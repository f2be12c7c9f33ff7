"""Frozen weights in 8 or 4 bits, and products with them. Only weights are rounded, never what passes through.

So a record's numbers depend on no other record: LLM.int8() takes a column for an outlier if any row of the batch has
one there, which would let a neighbour in. And the layer is the linear one of the rounded weight in both directions,
with or without gradients, on any device. The formats are those of bitsandbytes, nf4 to the bit, int8 without its
rounding to float16; its own 4-bit layer is not used: on cores with AVX512-BF16, after a pass without gradients it
computes in bfloat16 and has no backward pass any more (0.50.2).
"""

from collections import Counter
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

Quantization = Literal["int8", "nf4"]

FORMATS: dict[Quantization, str] = {"int8": "int8, absmax / 127 a row", "nf4": "nf4, absmax of 64"}
"""What each is called where two sides compare their base models: other rules for rounding need another name here."""

BLOCK = 64
"""Numbers of a row-major weight that share one scale in nf4, as in bitsandbytes: half a bit a number."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of a 4-bit code, in units of the block's absmax: QLoRA (arXiv 2305.14314), appendix E."""


class QuantisedLinear(nn.Module):
    """y = x @ weight.T + bias of a frozen layer, whose weight is there in whole only while it multiplies.

    It keeps nothing for the backward pass. It has no `weight`: nobody can merge into it, or take codes for numbers.

    codes: int8 (out, in), or uint8 (numbers / 2,) with the earlier of two numbers in the upper half.
    scales: float32 (out,), or one a block. pairs: what a byte of two codes stands for.
    """

    codes: Tensor
    scales: Tensor
    pairs: Tensor | None

    def __init__(self, layer: nn.Linear, quantization: Quantization, *, onednn: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.quantization: Quantization = quantization
        self.onednn = onednn
        codes, scales = _ROUND[quantization](layer.weight.detach().float())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("pairs", _pairs() if quantization == "nf4" else None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., out) of (..., in)."""
        # The product of a matrix is no view, so callers may add to it in place.
        rows = input.reshape(-1, self.in_features)
        return _Product.apply(rows, self).view(*input.shape[:-1], self.out_features)  # pyright: ignore

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rounded weight (out, in), made anew."""
        if self.pairs is None:
            return (self.codes * self.scales[:, None]).to(dtype)
        units = torch.embedding(self.pairs, self.codes.int())
        numbers = units.view(-1, BLOCK).mul_(self.scales[:, None]).view(-1)
        return numbers[: self.out_features * self.in_features].view(self.out_features, -1).to(dtype)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.in_features}, {self.out_features}, {self.quantization}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return _linear(x, layer.dense(x.dtype), layer.bias, layer.onednn)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = dys
        return _linear(dy, ctx.layer.dense(dy.dtype).t(), None, ctx.layer.onednn), None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    # Why oneDNN, `packed` says. It takes a weight in any order, at a tenth of the product's time at most: no copy is
    # kept here, where it would cost eight times what was saved.
    if onednn and x.is_cpu and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return linear(x, weight, bias)


def quantise_frozen(
    model: nn.Module,
    quantization: Quantization,
    serves: Callable[[str, nn.Module], bool],
    *,
    onednn: bool = False,
) -> int:
    """How many linear layers of `model` are now in so few bits: every frozen one that `serves` and shares no weight.

    Args:
        model: changed in place; each layer keeps its name. A weight's former storage is free once nobody holds it.
        quantization: into what.
        serves: whether a layer, by its path and itself, may be rounded.
        onednn: float32 products on cores are oneDNN's; see `packed.available`.
    """
    owners = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    chosen = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and not any(parameter.requires_grad for parameter in module.parameters())
        and owners[id(module.weight)] == 1
        and serves(path, module)
    ]
    for path in chosen:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(path, QuantisedLinear(layer, quantization, onednn=onednn), strict=True)
    return len(chosen)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1) / 127
    return torch.round(weight / _not_zero(scales)[:, None]).clamp(-127, 127).to(torch.int8), scales


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    flat = weight.reshape(-1)
    blocks = pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    values = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize(blocks * (1 / _not_zero(scales))[:, None], (values[1:] + values[:-1]) / 2)
    upper, lower = nearest.to(torch.uint8).view(-1, 2).unbind(dim=1)
    return upper << 4 | lower, scales


_ROUND: dict[Quantization, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"int8": _int8, "nf4": _nf4}


def _not_zero(scales: Tensor) -> Tensor:
    """What to divide by: numbers that are all zero have code zero."""
    return torch.where(scales == 0, 1.0, scales)


def _pairs() -> Tensor:
    """The two numbers (256, 2) that each byte stands for."""
    values, byte = torch.tensor(NF4), torch.arange(256)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1)
