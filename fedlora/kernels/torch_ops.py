"""Low-rank products and sums over examples in plain torch: the definition of correct for every faster kernel.

n examples, ... token axes (any number, also none), m outputs, r inputs, P trained numbers, k clients.
"""

import torch
from torch import Tensor

from fedlora.errors import ShapeError

CHUNK = 1 << 18
"""Numbers that are widened at a time, so that no wide copy of all gradients is ever made: 2 MB, which a cache holds."""


def per_example_gradient_into(out: Tensor, dy: Tensor, h: Tensor) -> None:
    """`out` (n, m, r) holds the gradient of each example's loss with respect to the weight of y = h @ weight.T.

    With LoRA's B as the weight, h = A x is already r wide, so this costs n T m r products and never forms
    anything of the size of A or of B A.

    Args:
        out: float32 or wider, the type that is computed in; each example's part contiguous, or its transpose.
        dy: gradient at the output (n, ..., m).
        h: input (n, ..., r), the same leading shape.

    Raises:
        ShapeError: the shapes do not fit.
    """
    if dy.ndim < 2 or dy.shape[:-1] != h.shape[:-1] or out.shape != (len(dy), dy.shape[-1], h.shape[-1]):
        raise ShapeError(
            f"dy {tuple(dy.shape)} and h {tuple(h.shape)} must share all axes but the last, "
            f"and out {tuple(out.shape)} their first and their last"
        )
    n, m, r = out.shape
    tokens = dy.shape[1:-1].numel()
    # Widened before the product: a bfloat16 sum over tokens is off by 1e-2, and clipping must see true norms.
    wide_dy, wide_h = dy.to(out.dtype), h.to(out.dtype)
    wide_dy, wide_h = wide_dy.reshape(n, tokens, m), wide_h.reshape(n, tokens, r)
    if out.stride(1) < out.stride(2):
        torch.bmm(wide_h.transpose(1, 2), wide_dy, out=out.transpose(1, 2))
    else:
        torch.bmm(wide_dy.transpose(1, 2), wide_h, out=out)


def per_example_bias_gradient_into(out: Tensor, dy: Tensor) -> None:
    """`out` (n, m) holds the gradient of each example's loss with respect to a bias, from dy (n, ..., m).

    Raises:
        ShapeError: the shapes do not fit.
    """
    if dy.ndim < 2 or out.shape != (len(dy), dy.shape[-1]):
        raise ShapeError(
            f"dy {tuple(dy.shape)} needs an axis of examples and one of outputs, as out {tuple(out.shape)}"
        )
    wide = dy.to(out.dtype).reshape(len(dy), dy.shape[1:-1].numel(), dy.shape[-1])
    torch.sum(wide, dim=1, out=out)


def norms(rows: Tensor) -> Tensor:
    """L2 norm (n,) float64 of each row of rows (n, P), from squares in float64; finite only if every entry is."""
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in _in_chunks(rows)]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)


def weighted_sums(rows: Tensor, shares: Tensor) -> Tensor:
    """shares (k, n) float64 @ rows (n, P), (k, P) in float64."""
    parts = [shares @ part.to(torch.float64) for part in _in_chunks(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def product_with_own(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (n, ..., m) of h (n, ..., r): y[i] = h[i] @ weight[i].T + bias[i], in the type of h.

    Args:
        h: (n, ..., r).
        weight: (n, m, r), one an example.
        bias: (n, m).

    Raises:
        ShapeError: n or r differ.
    """
    if h.ndim < 2 or weight.ndim != 3 or (len(h), h.shape[-1]) != (len(weight), weight.shape[2]):
        raise ShapeError(f"h {tuple(h.shape)} and weight {tuple(weight.shape)} must share n and r")
    n, m, r = weight.shape
    rows, turned = h.reshape(n, h.shape[1:-1].numel(), r), weight.transpose(1, 2)
    y = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias[:, None], rows, turned)
    return y.reshape(*h.shape[:-1], m)


def _in_chunks(rows: Tensor) -> tuple[Tensor, ...]:
    """The columns of rows (n, P), some at a time."""
    step = max(1, CHUNK // max(1, len(rows)))
    return (rows,) if rows.shape[1] <= step else rows.split(step, dim=1)
