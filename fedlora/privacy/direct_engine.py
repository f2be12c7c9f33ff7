"""Per-example gradients of linear layers, taken from what the backward pass computes anyway.

For y = h @ weight.T the gradient of example i is dy_i^T h_i. With LoRA's B as the weight, h = A x is r wide:
no gradient of the batch is ever formed, no second backward pass, and dy is dropped as soon as its product is
made.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.kernels import torch_ops
from fedlora.kernels.table import Ops
from fedlora.privacy.clipping import clipped_sum, clipped_sums
from fedlora.privacy.engine import TrainedLinear, require_per_record, trained_linears
from fedlora.privacy.rows import Columns, Rows
from fedlora.privacy.stacked import Stack

ANCHOR = torch.zeros((), requires_grad=True)
"""What the backward pass is asked for, though it is owed nothing: on its way it comes by every tap."""


@dataclass(frozen=True, slots=True)
class DirectEngine:
    """The low-rank engine; see `Engine` for its laws. ops: what computes."""

    ops: Ops = torch_ops

    def clipped_sum(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        losses: Iterable[Callable[[], Tensor]],
        max_grad_norm: float | None,
        sequences_per_record: int = 1,
    ) -> dict[str, Tensor]:
        """Sum over all examples of their jointly clipped gradients, float64; see `Engine.clipped_sum`."""
        linears = trained_linears(model, trained)
        columns = Columns.of(trained)
        sums = None
        for micro_batch in losses:
            rows = self._rows(linears, columns, micro_batch, sequences_per_record)
            if rows is not None:
                sums = _plus(sums, clipped_sum(self.ops, rows, max_grad_norm))
        return columns.split(_zeros(trained, columns.numbers) if sums is None else sums)

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
        columns = Columns.of(stack.trained, axes=1)
        sums = None
        for owners, micro_batch in losses:
            with stack.owned(owners):
                rows = self._rows(stack.linears, columns, micro_batch)
            if rows is not None:
                sums = _plus(sums, clipped_sums(self.ops, rows, owners, stack.clients, max_grad_norm))
        return columns.split(_zeros(stack.trained, stack.clients, columns.numbers) if sums is None else sums)

    def public_norms(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        losses: Iterable[Callable[[], Tensor]],
        sequences_per_record: int = 1,
    ) -> Tensor:
        """(n,) joint norms of the examples' gradients, before any clip. Of public records only: none is private.

        Args: see `Engine.clipped_sum`.
        """
        linears, columns = trained_linears(model, trained), Columns.of(trained)
        norms = [torch.zeros(0)]
        for micro_batch in losses:
            rows = self._rows(linears, columns, micro_batch, sequences_per_record)
            if rows is not None:
                norms.append(self.ops.norms(rows).cpu())
        return torch.cat(norms)

    def _rows(
        self,
        linears: tuple[TrainedLinear, ...],
        columns: Columns,
        micro_batch: Callable[[], Tensor],
        sequences_per_record: int = 1,
    ) -> Tensor | None:
        """The gradients (n, numbers) of a microbatch's examples; None where it has none."""
        rows = Rows(columns, self.ops, sequences_per_record)
        with _taps(linears, rows):
            losses = micro_batch()
            if losses.numel() == 0:
                return None
            require_per_record(losses)
            # Asking for the anchor's gradient alone reaches every tap and computes no gradient of a weight.
            torch.autograd.grad(losses, ANCHOR, grad_outputs=torch.ones_like(losses), allow_unused=True)
        return rows.whole(len(losses))


def _plus(sums: Tensor | None, part: Tensor) -> Tensor:
    return part if sums is None else sums.add_(part)


def _zeros(trained: Mapping[str, nn.Parameter], *shape: int) -> Tensor:
    """What empty draws sum to, float64, on the device of what is trained."""
    return torch.zeros(*shape, dtype=torch.float64, device=next(iter(trained.values())).device)


@contextmanager
def _taps(linears: tuple[TrainedLinear, ...], rows: Rows) -> Iterator[None]:
    handles = [linear.module.register_forward_hook(_tap(linear, rows)) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tap(linear: TrainedLinear, rows: Rows) -> Callable[..., Tensor]:
    def keep(dy: Tensor, h: Tensor) -> None:
        if linear.weight is not None:
            rows.add_weight(linear.weight, dy, h)
        if linear.bias is not None:
            rows.add_bias(linear.bias, dy)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        return _Tap.apply(output, inputs[0], ANCHOR, keep)  # pyright: ignore[reportReturnType]

    return hook


class _Tap(torch.autograd.Function):
    """The identity on y. Its backward hands (dy, h) to `keep`; for the anchor's sake autograd comes by."""

    @staticmethod
    def forward(ctx, y: Tensor, h: Tensor, anchor: Tensor, keep: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(h)
        ctx.keep = keep
        return y.view_as(y)

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple[Tensor, None, None, None]:
        (h,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.keep(dys[0], h)
        return dys[0], None, None, None
