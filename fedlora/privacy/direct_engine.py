"""Per-example gradients of linear layers, taken from what the backward pass computes anyway.

For y = h @ weight.T the gradient of example i is dy_i^T h_i. With LoRA's B as the weight, h = A x is r wide:
no gradient of the batch is ever formed, no second backward pass, and dy is dropped as soon as its product is
made.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedlora.errors import PrivacyError
from fedlora.kernels.torch_ops import per_example_bias_gradient, per_example_gradient
from fedlora.privacy.clipping import add_clipped_sum, add_clipped_sums
from fedlora.privacy.engine import TrainedLinear, require_per_record, trained_linears, zero_sums
from fedlora.privacy.stacked import Stack


class DirectEngine:
    """The low-rank engine. Stateless; see `Engine` for its laws."""

    def clipped_sum(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        losses: Iterable[Callable[[], Tensor]],
        max_grad_norm: float | None,
    ) -> dict[str, Tensor]:
        """Sum over all examples of their jointly clipped gradients, float64; see `Engine.clipped_sum`."""
        linears = trained_linears(model, trained)
        sums = zero_sums(trained)
        for micro_batch in losses:
            gradients = _per_example_gradients(linears, trained, micro_batch)
            if gradients:
                add_clipped_sum(sums, gradients, max_grad_norm)
        return sums

    def clipped_sums(
        self,
        stack: Stack,
        losses: Iterable[tuple[Tensor, Callable[[], Tensor]]],
        max_grad_norm: float | None,
    ) -> dict[str, Tensor]:
        """Sum over each client's own examples of their jointly clipped gradients, (clients, ...) float64.

        Args:
            stack: all that is trained in the model that the losses run.
            losses: the owner (n,) of each example of a microbatch, and the call that gives its losses (n,) while
                each example runs through the copies of its owner.
            max_grad_norm: the joint bound of every example.
        """
        sums = zero_sums(stack.trained)
        for owners, micro_batch in losses:
            with stack.owned(owners):
                gradients = _per_example_gradients(stack.linears, stack.trained, micro_batch)
            if gradients:
                add_clipped_sums(sums, gradients, owners, max_grad_norm)
        return sums


def _per_example_gradients(
    linears: tuple[TrainedLinear, ...], trained: Mapping[str, nn.Parameter], micro_batch: Callable[[], Tensor]
) -> dict[str, Tensor]:
    collected: dict[str, Tensor] = {}
    anchor = torch.zeros((), requires_grad=True)
    with _taps(linears, anchor, collected):
        losses = micro_batch()
        if losses.numel() == 0:
            return {}
        require_per_record(losses)
        # Asking for the anchor's gradient alone reaches every tap and computes no gradient of a weight.
        torch.autograd.grad(losses, anchor, grad_outputs=torch.ones_like(losses), allow_unused=True)
    _require_covered(collected, trained, len(losses))
    return collected


@contextmanager
def _taps(linears: tuple[TrainedLinear, ...], anchor: Tensor, collected: dict[str, Tensor]) -> Iterator[None]:
    handles = [linear.module.register_forward_hook(_tap(linear, anchor, collected)) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tap(linear: TrainedLinear, anchor: Tensor, collected: dict[str, Tensor]) -> Callable[..., Tensor]:
    def keep(dy: Tensor, h: Tensor) -> None:
        if linear.weight is not None:
            _add(collected, linear.weight, per_example_gradient(dy, h))
        if linear.bias is not None:
            _add(collected, linear.bias, per_example_bias_gradient(dy))

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        return _Tap.apply(output, inputs[0], anchor, keep)  # pyright: ignore[reportReturnType]

    return hook


def _add(collected: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    # A layer applied twice in one forward pass owes the sum of both: one example, one gradient, one clip.
    if name in collected and collected[name].shape != gradient.shape:
        raise PrivacyError(
            f"{name!r} saw {len(collected[name])} and then {len(gradient)} rows in one microbatch; "
            "the first axis must count its examples wherever the layer is used"
        )
    collected[name] = collected[name] + gradient if name in collected else gradient


def _require_covered(
    collected: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter], records: int
) -> None:
    missing = sorted(set(trained) - set(collected))
    if missing:
        raise PrivacyError(
            f"the loss does not pass through {missing} by calling their nn.Linear, they cannot be clipped; "
            "freeze them or call the module that owns them"
        )
    rows = {name: len(g) for name, g in collected.items() if len(g) != records}
    if rows:
        raise PrivacyError(
            f"{records} losses but {rows} rows of gradients; the first axis must count examples "
            "(do not flatten tokens into the batch)"
        )


class _Tap(torch.autograd.Function):
    """The identity on y. Its backward hands (dy, h) to `keep`; for the anchor's sake autograd comes by."""

    @staticmethod
    def forward(ctx, y: Tensor, h: Tensor, anchor: Tensor, keep: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(h)
        ctx.keep = keep
        return y.view_as(y)

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (h,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.keep(dys[0], h)
        return dys[0], None, torch.zeros(()), None
