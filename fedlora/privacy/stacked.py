"""Trained layers of several clients side by side in one model, whose frozen rest they share."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedlora.errors import PrivacyError
from fedlora.kernels.torch_ops import product_with_own
from fedlora.privacy.engine import TrainedLinear, trained_linears


class StackedLinear(nn.Module):
    """One copy of a linear layer a client; each example runs through the copy of its owner.

    weight: (clients, out, in). bias: (clients, out), or None. owners: (n,) int64, of the examples of the microbatch
    that is running; None between microbatches, when nothing may run.
    """

    def __init__(self, layer: nn.Linear, clients: int) -> None:
        super().__init__()
        self.weight = _copies(layer.weight, clients)
        self.bias = None if layer.bias is None else _copies(layer.bias, clients)
        self.owners: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        """(n, ..., out) of h (n, ..., in): h @ weight[owner].T + bias[owner], example by example."""
        if self.owners is None or len(self.owners) != len(h):
            known = None if self.owners is None else len(self.owners)
            raise PrivacyError(
                f"{len(h)} examples, owners of {known}: whose weights to use is unknown; run it under `owned`"
            )
        # The weights are constants here: their gradients are taken per example, by the tap on this layer's output.
        bias = None if self.bias is None else self.bias.detach()[self.owners]
        return product_with_own(h, self.weight.detach()[self.owners], bias)


@contextmanager
def stacked(
    model: nn.Module, trained: Mapping[str, nn.Parameter], clients: int
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, `model` holds `clients` copies of each trained layer, given as (clients, ...) by the names of `trained`.

    All start as the layer is. Afterwards the model has its own layers back, unchanged.

    Raises:
        PrivacyError: as `trained_linears`; or a layer is only partly trained, or carries hooks, which see one
            layer and would miss the copies.
    """
    layers = stackable(model, trained)
    copies: dict[str, nn.Parameter] = {}
    try:
        for layer, linear in layers:
            copy = StackedLinear(linear, clients)
            model.set_submodule(layer.path, copy, strict=True)
            for name, parameter in ((layer.weight, copy.weight), (layer.bias, copy.bias)):
                if name is not None and parameter is not None:
                    copies[name] = parameter
        yield {name: copies[name] for name in trained}
    finally:
        for layer, linear in layers:
            model.set_submodule(layer.path, linear, strict=True)


def stackable(
    model: nn.Module, trained: Mapping[str, nn.Parameter]
) -> tuple[tuple[TrainedLinear, nn.Linear], ...]:
    """The trained layers of `model`, all of which can be stacked; raises as `stacked` does."""
    layers = []
    for layer in trained_linears(model, trained):
        linear = layer.module
        assert isinstance(linear, nn.Linear)
        if layer.weight is None or (linear.bias is not None and layer.bias is None):
            raise PrivacyError(f"{layer.path!r} is only partly trained: train its clients one by one")
        if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
            raise PrivacyError(f"{layer.path!r} carries hooks: train its clients one by one")
        layers.append((layer, linear))
    return tuple(layers)


@contextmanager
def owned(layers: Iterable[TrainedLinear], owners: Tensor) -> Iterator[None]:
    """Inside, example i of whatever runs through the stacked layers belongs to client owners[i]."""
    stacks = [layer.module for layer in layers if isinstance(layer.module, StackedLinear)]
    try:
        for stack in stacks:
            stack.owners = owners
        yield
    finally:
        for stack in stacks:
            stack.owners = None


def _copies(parameter: Tensor, clients: int) -> nn.Parameter:
    return nn.Parameter(torch.stack([parameter.detach()] * clients))
