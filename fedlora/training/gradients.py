"""Which way public labelled records would move each frozen weight: LoRA-SB's start (arXiv 2411.19557)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.data.records import Examples
from fedlora.errors import DataError
from fedlora.training.model import AdaptedModel
from fedlora.training.public import leading
from fedlora.training.tasks import losses
from fedlora.values import Site


def gradient_directions(
    adapted: AdaptedModel, examples: Examples, r: int
) -> dict[Site, tuple[Tensor, Tensor]]:
    """The first r left (r, d_out) and right (r, d_in) singular vectors of each weight's gradient, float64, as rows.

    The gradient is of the mean loss over public records, at the base model: B is zero. A trained head begins at zero
    and would pass nothing on, so it first makes one step of plain descent on the same records; then it is put back.

    Args:
        adapted: as it was loaded. examples: public; no epsilon covers them.
        r: no more than a site's shorter side.

    Raises:
        DataError: these records would move some weight nowhere.
    """
    with _head_after_one_step(adapted, examples):
        gradients = _weight_gradients(adapted, examples)
    found = {}
    for site, gradient in gradients.items():
        left, sizes, right = torch.linalg.svd(gradient, full_matrices=False)
        if not float(sizes[0]) > 0:
            raise DataError(
                f"data.public: its {len(examples)} records do not move {site!r}; give records of several labels, or "
                "another lora.init"
            )
        found[site] = leading(left.T, r), leading(right, r)
    return found


def _weight_gradients(adapted: AdaptedModel, examples: Examples) -> dict[Site, Tensor]:
    """(d_out, d_in) float64 of each site, of the summed loss: frozen weights gather none, so it is made of what enters
    a layer and of what comes back to it."""
    sums = {
        site: torch.zeros(shape, dtype=torch.float64, device=adapted.device)
        for site, shape in adapted.shapes().items()
    }

    def into(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hear(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0].detach().double().flatten(0, -2)

            def add(dy: Tensor) -> None:
                total.add_(dy.double().flatten(0, -2).T @ x)

            if output.requires_grad:  # it does not where the layer will run again in the backward pass
                output.register_hook(add)

        return hear

    handles = [layer.register_forward_hook(into(sums[site])) for site, layer in adapted.layers().items()]
    try:
        _summed_gradient(adapted, examples)
    finally:
        for handle in handles:
            handle.remove()
    return sums


@contextmanager
def _head_after_one_step(adapted: AdaptedModel, examples: Examples) -> Iterator[None]:
    before = adapted.head()
    gradient = _summed_gradient(adapted, examples) if before else {}
    try:
        _set(adapted, {name: value - gradient[name] / len(examples) for name, value in before.items()})
        yield
    finally:
        _set(adapted, before)


def _summed_gradient(adapted: AdaptedModel, examples: Examples) -> dict[str, Tensor]:
    """Of the losses of all records, by all that is trained."""
    trained = adapted.trained_on("both" if adapted.trains_a else "b")
    try:
        for loss in losses(adapted, examples, np.arange(len(examples))):
            loss().sum().backward()
        nothing = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        return nothing | {name: p.grad for name, p in trained.items() if p.grad is not None}
    finally:
        for parameter in trained.values():
            parameter.grad = None


@torch.no_grad()
def _set(adapted: AdaptedModel, head: dict[str, Tensor]) -> None:
    for name, value in head.items():
        adapted.trained[name].copy_(value)
