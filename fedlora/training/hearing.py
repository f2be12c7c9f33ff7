"""What layers are given while a model runs once."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Key = TypeVar("Key")


@torch.no_grad()
def hear(
    model: nn.Module,
    layers: Mapping[Key, nn.Module],
    inputs: Mapping[str, Tensor],
    told: Callable[[Key, Tensor], object],
) -> None:
    """Runs the model forward; nothing of it stays on the layers, also where it fails.

    Args:
        model: takes `inputs`.
        layers: of this model.
        inputs: of any records.
        told: is called with a layer's key and its first input, each time that the layer is.
    """

    def telling(key: Key) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def tell(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            told(key, given[0])

        return tell

    handles = [layer.register_forward_pre_hook(telling(key)) for key, layer in layers.items()]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
