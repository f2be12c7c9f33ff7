"""Products with frozen weights on x86 cores: packed once for oneDNN, which torch's own linear layer leaves unused.

`nn.Linear` multiplies float32 through MKL, which on AMD cores stops at AVX2. oneDNN, in the same torch, uses what the
core has, and a weight that never changes need be brought into its order only once.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

LEAST = 1 << 16
"""Numbers of a weight from which packing pays: below, calls cost more than products (256 x 256: 1.5 times faster)."""


class PackedLinear(nn.Linear):
    """y = x @ weight.T + bias of a frozen layer. It keeps nothing for the backward pass.

    Each direction has its own packed copy of the weight, made when it is first needed: up to three times the memory.
    A changed weight is packed anew, unless it was written through `.data`, which torch does not count either.
    Whatever the copies cannot serve (another type or device than float32 on a core) runs as in any nn.Linear.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._packs: dict[bool, tuple[Tensor, tuple[int, int], Tensor]] = {}

    def forward(self, input: Tensor, plus: Tensor | None = None) -> Tensor:
        """(..., out) of (..., in), with `plus` of the result's shape and type added in the same pass."""
        if self._serves(input):
            return _Product.apply(input, plus, self)  # pyright: ignore[reportReturnType]
        y = linear(input, self.weight, self.bias)
        return y if plus is None else y + plus

    def product(self, x: Tensor, plus: Tensor | None) -> Tensor:
        """x (..., in) @ weight.T + bias + plus."""
        x, pack = x.contiguous(), self._pack(turned=False)
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(x, pack, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, plus.contiguous(), pack, self.bias, "add")

    def product_back(self, dy: Tensor) -> Tensor:
        """dy (..., out) @ weight."""
        return torch.ops.mkldnn._linear_pointwise(
            dy.contiguous(), self._pack(turned=True), None, "none", [], ""
        )

    def _pack(self, *, turned: bool) -> Tensor:
        weight, made = self.weight, self._packs.get(turned)
        state = weight._version, weight.data_ptr()  # moved by in-place operations, and by `weight.data = ...`
        if made is None or made[0] is not weight or made[1] != state:
            ordered = weight.detach().t().contiguous() if turned else weight.detach()
            made = weight, state, torch.ops.mkldnn._reorder_linear_weight(ordered, None)
            self._packs[turned] = made
        return made[2]

    def _serves(self, x: Tensor) -> bool:
        return (
            x.dtype == self.weight.dtype == torch.float32
            and x.is_cpu
            and self.weight.is_cpu
            and x.ndim > 1
            and not self.weight.requires_grad
            and not (self.bias is not None and self.bias.requires_grad)
            and not torch.is_autocast_enabled("cpu")
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        self._packs = {}  # of a weight that is about to be another
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packs": {}}  # packed copies can be neither copied nor pickled


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, plus: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer, ctx.version = layer, layer.weight._version
        return layer.product(x, plus)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, *dys: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.layer.weight._version != ctx.version:
            raise RuntimeError("a packed weight was changed in place between forward and backward pass")
        to_x, to_plus, _ = ctx.needs_input_grad
        return (ctx.layer.product_back(dys[0]) if to_x else None), (dys[0] if to_plus else None), None


def available() -> bool:
    """Whether this machine's torch can pack weights."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack_frozen(model: nn.Module, but: frozenset[int] = frozenset()) -> int:
    """How many linear layers of `model` now run packed: every frozen one of at least LEAST numbers.

    Args:
        model: changed in place; each layer keeps its name and its parameters.
        but: ids of modules that stay, since their weights change though they are not trained.
    """
    frozen = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) not in but
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= LEAST
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]
    for path, module in frozen:
        model.set_submodule(path, PackedLinear(module), strict=True)
    return len(frozen)
