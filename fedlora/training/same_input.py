"""Adapted layers that are given one tensor (q, k and v) read it once, in one product with all their A.

There is no kernel of our own here: one product of a library's, k r numbers wide, is as fast as the device allows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from fedlora.training.hearing import hear
from fedlora.training.model import ADAPTER
from fedlora.values import Site


@dataclass(frozen=True, slots=True)
class _Offer:
    """What the first layer computed for the others, until each has taken its part, or x is gone."""

    x: ReferenceType[Tensor]
    x_version: int
    with_gradient: bool
    parts: dict[LoraLayer, tuple[Tensor, int]]
    """Of each layer that may still come, and the version of its A."""


class SameInput:
    """Layers that were seen to be given one tensor, in the order of their calls; of equal scaling.

    The first to run computes scale A x of all, and every other may take its part once, if it is given that very
    tensor, unchanged; else it computes its own. What nobody took goes with the tensor, or when the first runs again.
    Every A is a part of `matrix`, so that whatever is written into one is in the product. Where that does not hold
    (the model was copied or moved) it is put right when the first runs; where it cannot (A is trained, or its calls
    are watched) there is no common product.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = tuple(layers)
        self.matrix: Tensor | None = None
        self._offer: _Offer | None = None

    def low(self, layer: LoraLayer, x: Tensor) -> Tensor | None:
        """scale A x, (..., r), in the type of A; None where this layer has to compute its own.

        Args:
            layer: one of `layers`.
            x: (..., in), what it is given.
        """
        if layer is not self.layers[0]:
            return self._taken(layer, x)
        self._offer = None
        if x.is_inference() or not self._gathered():
            return None
        assert self.matrix is not None
        h = linear(x.to(self.matrix.dtype), self.matrix) * layer.scaling[ADAPTER]
        own, *others = h.split([each.r[ADAPTER] for each in self.layers], dim=-1)
        parts = {
            other: (part, _a_of(other)._version) for other, part in zip(self.layers[1:], others, strict=True)
        }
        self._offer = _Offer(
            x=ref(x, lambda _: parts.clear()),
            x_version=x._version,
            with_gradient=torch.is_grad_enabled(),
            parts=parts,
        )
        return own

    def _taken(self, layer: LoraLayer, x: Tensor) -> Tensor | None:
        offer = self._offer
        if offer is None or offer.x() is not x:
            return None
        part, version = offer.parts.pop(layer, (None, None))
        unchanged = offer.x_version == x._version and version == _a_of(layer)._version
        return part if unchanged and offer.with_gradient == torch.is_grad_enabled() else None

    def _gathered(self) -> bool:
        """Whether every A is a part of `matrix`, which is made if it was not so."""
        weights = [_a_of(layer) for layer in self.layers]
        if any(weight.requires_grad for weight in weights) or any(map(_is_watched, self.layers)):
            return False
        if self.matrix is None or not _lie_in(self.matrix, weights):
            if len({(weight.dtype, weight.device) for weight in weights}) > 1:
                return False
            self.matrix = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, self.matrix.split([len(w) for w in weights]), strict=True):
                weight.data = part
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "matrix": None,
            "_offer": None,
        }  # a copy's A are no parts of anything yet


def _a_of(layer: LoraLayer) -> Tensor:
    weight = layer.lora_A[ADAPTER].weight
    assert isinstance(weight, Tensor)
    return weight


def _is_watched(layer: LoraLayer) -> bool:
    down = layer.lora_A[ADAPTER]
    return bool(down._forward_hooks or down._forward_pre_hooks or down._backward_hooks)


def _lie_in(matrix: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the weights are the rows of matrix, in their order."""
    place, size = matrix.data_ptr(), matrix.element_size()
    for weight in weights:
        if weight.data_ptr() != place or weight.dtype != matrix.dtype or not weight.is_contiguous():
            return False
        place += weight.numel() * size
    return True


def same_inputs(
    model: nn.Module, layers: Mapping[Site, LoraLayer], inputs: Mapping[str, Tensor]
) -> dict[Site, SameInput]:
    """A `SameInput` for each of `layers` that `model` gives a tensor which others are given too, as one pass shows.

    Args:
        model: takes `inputs`.
        layers: of this model.
        inputs: of any records.
    """
    given: dict[Site, list[Tensor]] = {}
    modules = {site: module for site, module in layers.items() if isinstance(module, nn.Module)}
    hear(model, modules, inputs, lambda site, tensor: given.setdefault(site, []).append(tensor))
    groups: dict[tuple[int, ...], list[Site]] = {}
    for site, tensors in given.items():  # which keeps them all, so that no two have one id
        groups.setdefault(tuple(map(id, tensors)), []).append(site)
    return {
        site: together
        for group in groups.values()
        if len(group) > 1
        for together in [SameInput([layers[site] for site in group])]
        for site in group
    }
