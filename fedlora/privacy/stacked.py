"""Trained layers of several clients side by side in one model, whose frozen rest they share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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
                f"{len(h)} examples, owners of {known}: whose weights to use is unknown; the first axis must count "
                "examples, and a microbatch run under `Stack.owned`"
            )
        # The weights are constants here: their gradients are taken per example, by the tap on this layer's output.
        bias = None if self.bias is None else self.bias.detach()[self.owners]
        return product_with_own(h, self.weight.detach()[self.owners], bias)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stack:
    """The stacked layers of a model. trained: (clients, ...) each, by the names that one client's have."""

    clients: int
    linears: tuple[TrainedLinear, ...]
    trained: Mapping[str, nn.Parameter]

    @contextmanager
    def owned(self, owners: Tensor) -> Iterator[None]:
        """Inside, example i of whatever runs through the model belongs to client owners[i]."""
        layers = [linear.module for linear in self.linears]
        try:
            for layer in layers:
                layer.owners = owners  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
            yield
        finally:
            for layer in layers:
                layer.owners = None  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]


@contextmanager
def stacked(
    model: nn.Module, trained: Mapping[str, nn.Parameter], layers: tuple[TrainedLinear, ...], clients: int
) -> Iterator[Stack]:
    """Inside, `model` holds `clients` copies of each trained layer, all equal to it. Then it has its own back.

    Args:
        model: what they are in.
        trained: by name, the parameters that are copied.
        layers: `stackable(model, trained)`.
        clients: how many.
    """
    copies: dict[str, nn.Parameter] = {}
    try:
        for layer in layers:
            assert isinstance(layer.module, nn.Linear)
            copy = StackedLinear(layer.module, clients)
            model.set_submodule(layer.path, copy, strict=True)
            for name, parameter in ((layer.weight, copy.weight), (layer.bias, copy.bias)):
                if name is not None and parameter is not None:
                    copies[name] = parameter
        ordered = {name: copies[name] for name in trained}
        yield Stack(clients=clients, linears=trained_linears(model, ordered, StackedLinear), trained=ordered)
    finally:
        for layer in layers:
            model.set_submodule(layer.path, layer.module, strict=True)


def stackable(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> tuple[TrainedLinear, ...]:
    """The trained layers of `model`, all of which can be stacked.

    Raises:
        PrivacyError: as `trained_linears`; or a layer is only partly trained, or carries hooks, which the copies
            would lack.
    """
    layers = trained_linears(model, trained)
    for layer in layers:
        linear = layer.module
        assert isinstance(linear, nn.Linear)
        if layer.weight is None or (linear.bias is not None and layer.bias is None):
            raise PrivacyError(f"{layer.path!r} is only partly trained; train its clients one by one")
        if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
            raise PrivacyError(f"{layer.path!r} carries hooks; train its clients one by one")
    return layers


def _copies(parameter: Tensor, clients: int) -> nn.Parameter:
    return nn.Parameter(torch.stack([parameter.detach()] * clients))
